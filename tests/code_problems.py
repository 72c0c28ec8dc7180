"""Problems of our own in the columns of HumanEval, MBPP and TraceRL's programs.

Each with a right solution and with a wrong one (`wrong`) that fails at least one test.
"""


def _humaneval(name, header, doc, body, wrong, checks, before="", helpers=""):
    lines = "\n".join(f"    {line}" for line in checks)
    return {
        "task_id": f"Own/{name}",
        "prompt": f'{before}\n\n{helpers}def {name}{header}:\n    """ {doc}\n    """\n',
        "entry_point": name,
        "canonical_solution": body,
        "test": f"\n\nMETADATA = {{'author': 'own'}}\n\n\ndef check(candidate):\n{lines}\n",
        "wrong": wrong,
    }


HUMANEVAL = [
    _humaneval(
        "has_near",
        "(numbers: List[float], limit: float) -> bool",
        "Whether two numbers lie closer to each other than limit.",
        "    ordered = sorted(numbers)\n"
        "    return any(b - a < limit for a, b in zip(ordered, ordered[1:]))\n",
        "    return True\n",
        [
            "assert candidate([1.0, 2.0, 3.9], 0.3) == False",
            "assert candidate([1.0, 2.0, 1.1], 0.3) is True",
        ],
        before="from typing import List",
    ),
    _humaneval(
        "truncate",
        "(number: float) -> float",
        "The part of a positive number behind the point.",
        "    return number % 1.0\n",
        "    return number\n",
        ["assert candidate(3.5) == 0.5", "assert abs(candidate(1.33) - 0.33) < 1e-6"],
    ),
    _humaneval(
        "paren_groups",
        "(text: str) -> List[str]",
        "Balanced groups of parentheses, blanks dropped.",
        "    groups, depth, start = [], 0, ''\n"
        "    for c in text.replace(' ', ''):\n"
        "        start += c\n"
        "        depth += 1 if c == '(' else -1\n"
        "        if depth == 0:\n"
        "            groups.append(start)\n"
        "            start = ''\n"
        "    return groups\n",
        "    return text.split()\n",
        ["assert candidate('( ) (( )) (( )( ))') == ['()', '(())', '(()())']"],
        before="from typing import List",
    ),
    _humaneval(
        "sum_product",
        "(numbers: List[int]) -> Tuple[int, int]",
        "Sum and product; of nothing 0 and 1.",
        "    product = 1\n    for n in numbers:\n        product *= n\n"
        "    return sum(numbers), product\n",
        "    return sum(numbers), 0\n",
        ["assert candidate([]) == (0, 1)", "assert candidate([3, 5]) == (3 + 5, 3 * 5)"],
        before="from typing import List, Tuple",
    ),
    _humaneval(
        "decode_shift",
        "(text: str) -> str",
        "Undoes encode_shift.",
        "    return ''.join(chr((ord(c) - 5 - ord('a')) % 26 + ord('a')) for c in text)\n",
        "    return text\n",
        [
            "from random import choice, randint",
            "import string",
            "for _ in range(20):",
            "    text = ''.join(choice(string.ascii_lowercase) for _ in range(randint(10, 20)))",
            "    assert candidate(encode_shift(text)) == text",
        ],
        helpers="def encode_shift(text: str):\n    return ''.join(chr((ord(c) + 5 - ord('a')) % 26 "
        "+ ord('a')) for c in text)\n\n\n",
    ),
    _humaneval(
        "mean_absolute_deviation",
        "(numbers)",
        "Mean distance from the mean.",
        "    mean = sum(numbers) / len(numbers)\n"
        "    return sum(abs(n - mean) for n in numbers) / len(numbers)\n",
        "    return 0.0\n",
        ["assert abs(candidate([1.0, 2.0, 3.0, 4.0]) - 1.0) < 1e-6"],
    ),
    _humaneval(
        "only_ints",
        "(values: List[Any]) -> List[int]",
        "The integers among the values.",
        "    return [v for v in values if isinstance(v, int)]\n",
        "    return values\n",
        ["assert candidate([4, {}, [], 23.2, 9, 'adasd']) == [4, 9]", "assert candidate([]) == []"],
        before="from typing import Any, List",
    ),
    _humaneval(
        "histogram",
        "(text)",
        "How often each of the most frequent letters occurs.",
        "    from collections import Counter\n    counts = Counter(text.split())\n"
        "    return {k: v for k, v in counts.items() if v == max(counts.values())}\n",
        "    return {}\n",
        ["assert candidate('a b b a c') == {'a': 2, 'b': 2}", "assert candidate('') == {}"],
    ),
    _humaneval(
        "grow_set",
        "(values)",
        "The values and their successors, without repetition.",
        "    return set(values) | {v + 1 for v in values}\n",
        "    return list(values)\n",
        ["assert candidate([1, 2]) == {1, 2, 3}", "assert isinstance(candidate([5]), set)"],
    ),
    _humaneval(
        "by_key",
        "(key, values)",
        "The values in the order of key.",
        "    return sorted(values, key=key)\n",
        "    return sorted(values)\n",
        [
            "assert candidate(lambda v: -v, [1, 3, 2]) == [3, 2, 1]",
            "assert candidate(len, ['aa', 'b']) == ['b', 'aa']",
        ],
    ),
]

MBPP = [
    {
        "task_id": number,
        "text": text,
        "code": code,
        "test_list": tests,
        "test_setup_code": setup,
        "wrong": wrong,
    }
    for number, (text, code, tests, setup, wrong) in enumerate(
        [
            (
                "Write a function to find the elements that two tuples share.",
                "def shared(a, b):\n    return tuple(set(a) & set(b))",
                [
                    "assert set(shared((3, 4, 5, 6), (5, 7, 4, 10))) == set((4, 5))",
                    "assert set(shared((1, 2), (3, 4))) == set()",
                ],
                "",
                "def set(*x): return 0\ndef shared(a, b): return a",
            ),
            (
                "Write a function that says whether a number is not prime.",
                "import math\ndef is_not_prime(n):\n"
                "    return any(n % i == 0 for i in range(2, int(math.sqrt(n)) + 1))",
                ["assert is_not_prime(2) == False", "assert is_not_prime(10) == True"],
                "",
                "def is_not_prime(n): return False",
            ),
            (
                "Write a function to sort a list in place.",
                "def arrange(values):\n    values.sort()",
                ["v = [3, 1, 2]\narrange(v)\nassert v == [1, 2, 3]"],
                "",
                "def arrange(values): return sorted(values)",
            ),
            (
                "Write a function to find the height of a binary tree of Nodes.",
                "class Node:\n    def __init__(self, data):\n        self.data = data\n"
                "        self.left = self.right = None\n"
                "def height(node):\n    return 0 if node is None else "
                "1 + max(height(node.left), height(node.right))",
                ["assert (height(root)) == 3"],
                "root = Node(1)\nroot.left = Node(2)\nroot.right = Node(3)\n"
                "root.left.left = Node(4)",
                "class Node:\n    def __init__(self, data): pass\ndef height(node): return 2",
            ),
            (
                "Write a function to match words that begin with p.",
                "import re\ndef starts_p(word):\n    return re.match(r'p\\w*', word)",
                ["assert starts_p('python')", "assert not starts_p('ruby')"],
                "",
                "def starts_p(word): return True",
            ),
            (
                "Write a function that gives the first n squares, one after the other.",
                "def squares(n):\n    for i in range(n):\n        yield i * i",
                [
                    "assert list(squares(4)) == [0, 1, 4, 9]",
                    "assert next(squares(1)) == 0",
                    "assert sum(squares(3)) == 5",
                ],
                "",
                "def squares(n): return [0] * n",
            ),
            (
                "Write a function that raises ValueError for negative numbers.",
                "def root(x):\n    if x < 0:\n        raise ValueError('negative')\n"
                "    return x ** 0.5",
                [
                    "try:\n    root(-1)\nexcept ValueError as error:\n"
                    "    assert str(error) == 'negative'\nelse:\n    raise AssertionError",
                    "assert root(9) == 3.0",
                ],
                "",
                "def root(x): return abs(x) ** 0.5",
            ),
            (
                "Write a function to add complex numbers and bytes lengths.",
                "def mixed(z, data):\n    return z + len(data)",
                [
                    "assert mixed(1 + 2j, b'abc') == 4 + 2j",
                    "assert mixed(1.5, bytearray(2)) == 3.5",
                ],
                "",
                "def mixed(z, data): return z",
            ),
            (
                "Write a function to divide exactly.",
                "from fractions import Fraction\nfrom decimal import Decimal\n"
                "def exact(a, b):\n    return Fraction(a, b), Decimal(a) / Decimal(b)",
                ["assert exact(1, 4) == (Fraction(1, 4), 0.25)"],
                "from fractions import Fraction",
                "def exact(a, b): return a / b + 1",
            ),
            (
                "Write a function that nests and gives None, nan and infinities.",
                "def special():\n    return {'a': [None, float('inf')], ('b',): {1: float('nan')}}",
                [
                    "assert special()['a'] == [None, float('inf')]",
                    "assert special()[('b',)][1] != special()[('b',)][1]",
                ],
                "",
                "def special(): return {'a': [0, float('inf')], ('b',): {1: 0}}",
            ),
        ],
        start=1,
    )
]


def _program(question, solution, wrong, cases):
    return {
        "question": question,
        "test_method": "stdio",
        "test_time_limit": 5,
        "test_list": None,
        "test_input": [given for given, _ in cases],
        "test_output": [wanted for _, wanted in cases],
        "prefix": "",
        "solution": solution,
        "wrong": wrong,
    }


PROGRAMS = [
    _program("Add.", "print(sum(map(int, input().split())))", "print(3)",
             [("1 2", "3"), ("4 5", "9")]),
    _program("Echo.", "import sys\nprint(sys.stdin.read())", "print()", [("a\nb\n", "a b")]),
    _program("Largest.", "input()\nprint(max(map(int, input().split())))", "print(7)",
             [("3\n1 7 2\n", "7\n"), ("1\n-4\n", "-4\n")]),
    _program("Reverse.", "print(input()[::-1])", "print(input())", [("abc", "cba"), ("äö", "öä")]),
    _program("Count to n.", "for i in range(int(input())):\n    print(i)", "print(0)",
             [("3", "0\n1\n2"), ("0", "")]),
    _program("Words.", "print(len(input().split()))", "print(2)", [("a b", "2"), ("a b c", "3")]),
    _program("Half.", "print(int(input()) / 2)", "print(1)", [("3", "1.5")]),
    _program("Main.", "def main():\n    print('yes' if int(input()) % 2 else 'no')\n\n"
             "if __name__ == '__main__':\n    main()", "print('yes')", [("1", "yes"), ("2", "no")]),
    _program("Exit early.", "import sys\nn = int(input())\nprint(n)\nsys.exit()",
             "import sys\nprint(input())\nsys.exit(3)", [("5", "5")]),
    _program("Deep.", "import sys, threading\nsys.setrecursionlimit(20000)\n"
             "def f(n): return 0 if n == 0 else 1 + f(n - 1)\ndef main(): print(f(int(input())))\n"
             "threading.stack_size(1 << 26)\nt = threading.Thread(target=main)\nt.start()\n"
             "t.join()",
             "print(0)", [("9000", "9000")]),
]  # fmt: skip
