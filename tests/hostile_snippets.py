"""Snippets that try to get a verdict they do not deserve, or to do harm, instead of adding.

Those that look for the tests know them by NEEDLE, which must not stand in the snippet itself.
"""

NEEDLE = "' '.join(('assert', 'add'))"
SNIPPETS = {
    "exit": "exit()",
    "os._exit": "import os\nos._exit(0)",
    "SystemExit": "raise SystemExit(0)",
    "SystemExit in the call": "def add(a, b):\n    raise SystemExit(0)",
    "os._exit in the call": "import os\ndef add(a, b):\n    os._exit(0)",
    "AssertionError is no error": """
import builtins
builtins.AssertionError = KeyError
class AssertionError(BaseException): pass
def add(a, b): return 0
""",
    "everything is equal": """
class Same(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __bool__(self): return True
    def __hash__(self): return 3
def add(a, b): return Same()
""",
    "an object that is equal": """
class Same:
    def __eq__(self, other): return True
    def __hash__(self): return 3
    def __getattr__(self, name): return Same()
    __radd__ = __add__ = __call__ = lambda *_: True
def add(a, b): return Same()
""",
    "a class with a metaclass that is equal": """
class Meta(type):
    def __eq__(self, other): return True
    def __hash__(self): return 3
class add(metaclass=Meta):
    def __new__(cls, a, b): return cls
""",
    "unittest and builtins replaced": """
import builtins, unittest, sys
unittest.TestCase.assertEqual = lambda *a, **k: None
builtins.__dict__['exec'] = builtins.__dict__['compile'] = lambda *a, **k: None
builtins.isinstance = lambda *a: True
sys.modules['builtins'].all = lambda *_: True
def add(a, b): return None
""",
    "exceptions without end": """
class Odd(Exception):
    def __str__(self): raise Odd
    __repr__ = __str__
def add(a, b): raise Odd
""",
    "a trace function": """
import sys
def trace(frame, event, arg):
    frame.f_locals.clear()
    return trace
sys.settrace(trace)
def add(a, b): return 0
""",
    "secrets of frames and the collector": """
import gc, sys
def add(a, b):
    frame = sys._getframe()
    while frame:
        for value in frame.f_locals.values():
            if isinstance(value, dict) and 'tests' in value: return a + b
        frame = frame.f_back
    for thing in gc.get_objects():
        if isinstance(thing, dict):
            for value in list(thing.values()):
                if isinstance(value, str) and NEEDLE in value: return a + b
    return 0
""",
    "printing a verdict": """
import sys
for stream in (sys.stdout, sys.stderr, sys.__stdout__):
    stream.write('ready\\nloaded\\npass\\npass\\npass\\n')
    stream.flush()
def add(a, b):
    print('pass')
    return 0
""",
    "writing every open file": """
import os
for fd in range(1024):
    try: os.write(fd, b'ready\\nloaded\\npass\\npass\\npass\\n')
    except OSError: pass
def add(a, b): return 0
""",
    "writing messages": """
import os, struct
body = b't' + struct.pack('>I', 3) + b's\\x00\\x00\\x00\\x05valueTN'
for fd in range(3, 64):
    try:
        for _ in range(50): os.write(fd, struct.pack('>I', len(body)) + body)
    except OSError: pass
os._exit(0)
""",
    "closing every open file": "import os\nos.closerange(0, 4096)\ndef add(a, b): return a + b",
    "replacing every open file": """
import os
null = os.open(os.devnull, os.O_RDWR)
for fd in range(64):
    if fd != null: os.dup2(null, fd)
def add(a, b): return a + b
""",
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "fork bomb in the call": """
import os
def add(a, b):
    while True:
        try: os.fork()
        except OSError: pass
""",
    "ten gigabytes": "x = bytearray(10_000_000_000)\nx[::4096] = b'1' * len(x[::4096])",
    "memory without end": "x = [0]\nwhile True: x += x",
    "endless loop": "while True: pass",
    "endless loop in the call": "def add(a, b):\n    while True: pass",
    "endless output": "while True: print('x' * 1_000_000)",
    "endless answer": "def add(a, b):\n    x = []\n    x.append(x)\n    return x",
    "a large answer": "def add(a, b): return [0] * 50_000_000",
    "deleting the working directory": """
import os, shutil
shutil.rmtree(os.getcwd(), ignore_errors=True)
shutil.rmtree(os.environ['HOME'], ignore_errors=True)
def add(a, b): return 0
""",
    "reading the tests": """
import os, sys
def found(text): return NEEDLE.encode() in text
def add(a, b):
    for root in ('/proc/%s' % os.getppid(), '/proc/self', '/proc/1', os.getcwd(), '/dev/shm'):
        for folder, _, names in os.walk(root):
            for name in names[:200]:
                try:
                    with open(os.path.join(folder, name), 'rb', 0) as file:
                        if found(file.read(10_000)): return a + b
                except OSError: pass
    return 0
""",
    "memory of other processes": """
import os
def add(a, b):
    for pid in filter(str.isdigit, os.listdir('/proc') if os.path.isdir('/proc') else []):
        if int(pid) == os.getpid(): continue
        try:
            for line in open(f'/proc/{pid}/maps'):
                if '[heap]' in line:
                    start, end = (int(x, 16) for x in line.split()[0].split('-'))
                    with open(f'/proc/{pid}/mem', 'rb', 0) as memory:
                        memory.seek(start)
                        if NEEDLE.encode() in memory.read(end - start): return a + b
        except (OSError, ValueError, OverflowError): pass
    return 0
""",
    "sockets": """
import socket
def add(a, b):
    try:
        socket.create_connection(('127.0.0.1', PORT), timeout=0.5).close()
        return a + b
    except OSError:
        return 0
""",
    "killing the parent": """
import os, signal
try: os.kill(os.getppid(), 9)
except OSError: pass
def add(a, b): return 0
""",
    "killing the process group": """
import os, signal
try: os.killpg(os.getpgid(os.getppid()), 9)
except OSError: pass
os.killpg(0, 9)
def add(a, b): return 0
""",
    "killing everybody": """
import os, signal
try: os.kill(-1, 9)
except OSError: pass
def add(a, b): return 0
""",
    "a tower of powers": "def add(a, b): return 9**9**9**9",
    "a tower of powers as a constant": "x = 9**9**9**9\nadd = lambda a, b: x",
    "deep parentheses": "x = " + "(" * 100_000 + ")" * 100_000,
    "deep brackets": "def add(a, b): return " + "[" * 5000 + "]" * 5000,
    "deep minus": "x = " + "-" * 200_000 + "1",
    "a megabyte": "x = '" + "a" * 1_000_000 + "'\ndef add(a, b): return x",
    "NUL": "def add(a, b):\x00 return a + b",
    "surrogates": "x = '\ud800'\ndef add(a, b): return x",
    "a surrogate in the answer": "def add(a, b): return chr(0xd800)",
    "invalid UTF-8": "import sys\nsys.stdout.buffer.write(bytes(range(256)))\nadd = b'\\xff'",
    "a daemon": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in range(64):
            try: os.close(fd)
            except OSError: pass
        time.sleep(600)
    os._exit(0)
def add(a, b): return 0
""",
    "threads that never end": """
import threading
def loop():
    while True: pass
for _ in range(4): threading.Thread(target=loop).start()
def add(a, b): return 0
""",
    "signals ignored": """
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
while True: pass
""",
    "filling the disk": """
import os
try:
    for number in range(10_000):
        with open(f'f{number}', 'wb') as file:
            for _ in range(100): file.write(bytes(1 << 20))
except OSError: pass
def add(a, b): return 0
""",
    "a directory that nobody may enter": """
import os
os.makedirs('a/b/c')
os.symlink('/', 'a/root')
os.symlink(os.path.expanduser('~'), 'a/b/home')
open('a/b/file', 'w').close()
for path in ('a/b/c', 'a/b', 'a', '.'): os.chmod(path, 0)
def add(a, b): return 0
""",
    "deep directories": """
import os
try:
    for _ in range(3000):
        os.mkdir('d')
        os.chdir('d')
except OSError: pass
def add(a, b): return 0
""",
    "code at the end": """
import atexit, os
class End:
    def __del__(self): os.write(2, b'pass\\n')
end = End()
atexit.register(lambda: os.write(1, b'pass\\n'))
def add(a, b): return 0
""",
    "the stack": """
import sys
sys.setrecursionlimit(10**9)
def add(a, b): return add(b, a)
""",
    "a crash": "import ctypes\nctypes.string_at(0)",
    "a crash in the call": "import ctypes\ndef add(a, b): return ctypes.string_at(0)",
    "stopping itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nwhile True: pass",
    "becoming another program": "import os\nos.execv('/bin/sh', ['sh', '-c', 'echo pass; exit 0'])",
    "a name of the tests": "def add(a, b): return 0\nassert_ = isinstance = print = len = add",
    "questions to the tests": """
import sys
from inside import link, wire
def add(a, b):
    frame = sys._getframe()
    while 'self' not in frame.f_locals: frame = frame.f_back
    other = frame.f_locals['self']
    for number in range(20):
        for operation in link.OPERATIONS:
            try:
                if 'assert' in str(other.request(number, operation, ('__globals__',))): return a + b
            except (Exception, RecursionError): pass
    return 0
""",
}
