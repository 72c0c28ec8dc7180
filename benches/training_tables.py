"""Sections of the benchmark page on training: steps of BGPO, TraceRL and TreePO, and attention."""

from __future__ import annotations

from typing import Any

from table_cells import Case, ms, ratio, table


def _where(found: dict[str, Any]) -> str:
    machine, versions = found["machine"], found["versions"]
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['instruction set']}; torch "
        f"{versions['torch']}. Command: `{found['command']}`."
    )


def _seconds(case: Case) -> Any:
    """See the page's opening."""
    return case["cpu_s"]["least"] if case["threads"] == 1 else case["wall_s"]["median"]


def bgpo_section(found: dict[str, Any]) -> str:
    """An optimizer step of BGPO: torch's own way, autograd's gradient of the head, in place."""
    rows = [
        [
            *(row["size"], row["precision"]),
            *(ms(row["seconds"][kind]) for kind in ("torch", "autograd", "in_place")),
            f"{row['torch_over_in_place']:.2f}",
            f"{row['autograd_over_in_place']:.2f}",
            f"{row['metrics_differ_by']:.1e}",
            f"{row['error']['torch']:.2e} / {row['error']['in_place']:.2e}",
        ]
        for row in found["rows"]
    ]
    header = ["size", "precision", "torch, ms", "autograd, ms", "in place, ms"]
    header += ["torch / in place", "autograd / in place", "metrics differ by"]
    header += ["error: torch / in place"]
    return (
        "## BGPO's optimizer step\n\n"
        "torch: the head's gradient by autograd, one whole gradient for each micro-batch, torch's "
        "linear layers, AdamW tensor by tensor. autograd: linear layers through oneDNN, AdamW's "
        "fused step. In place: that, and the head's gradient added in place; what training does. "
        "Metrics differ by: in place from torch, relative. Error: of both, from a head computed "
        "in float32 with what autocast rounded; in bf16 what they share is far above what they "
        "differ by (autograd rounds the head's gradient to 16 bits for each micro-batch). "
        f"Process CPU time, median of {found['rounds']}, {found['threads']} "
        f"thread(s), torch {found['versions']['torch']}. Command: `python benches/bgpo_update.py`."
        "\n\n" + table(header, rows)
    )


def update_section(found: dict[str, Any]) -> str:
    pattern, model = found["pattern"], found["model"]
    text = (
        "## TraceRL's policy pass\n\n"
        f"A response of {pattern['response']} tokens behind {pattern['prompt']}, blocks of "
        f"{pattern['block_size']}, {pattern['steps']} steps as published for SDAR-4B on MATH500. "
        "Forward, clipped objective with KL, backward; Qwen3's backbone of width "
        f"{model['hidden_size']}, {model['num_hidden_layers']} layers, {model['vocab_size']} "
        "tokens, float32. Published: a row [prompt, clean, noisy] for every round of the blocks, "
        "one dense mask, logits of all rows or of the targets alone; packed, eager: our rows "
        "through the same plain torch. Difference: of the loss, and the largest relative one of a "
        "parameter's gradient, from ours. Providers in turn in one process, "
        f"{found['rounds']} calls of each.\n{_where(found)}\n"
    )
    titles = {"later": "Old log-probabilities given", "first": "The policy has not moved yet"}
    for update, title in titles.items():
        rows = []
        cases = [case for case in found["cases"] if case["update"] == update]
        threads = list(dict.fromkeys(case["threads"] for case in cases))
        for name in dict.fromkeys(case["provider"] for case in cases):
            of_name = [case for case in cases if case["provider"] == name]
            first = of_name[0]
            cells = [name, str(first["rows"]), str(first["head_rows"])]
            for case in of_name:
                own = next(c for c in cases if c["threads"] == case["threads"])
                cells += [ms(_seconds(case)), ratio(_seconds(case), _seconds(own))]
            wrong = first["difference"]
            cells += [f"{wrong['loss']:.1e}, {wrong['gradient']:.1e}"]
            rows.append([*cells, f"{first['extra_bytes'] / 1e6:.0f}"])
        header = ["", "rows", "rows of logits"]
        for count in threads:
            header += [f"ms, {count} thread{'s' * (count > 1)}", "ratio"]
        text += f"\n{title}:\n\n" + table([*header, "difference", "extra MB"], rows)
    return text


def attention_section(found: dict[str, Any]) -> str:
    heads, key_heads, width = found["heads"]
    text = (
        "## Attention over packed traces\n\n"
        f"`interval_attention` and one `scaled_dot_product_attention` under a [T, T] mask, {heads} "
        f"heads on {key_heads} of width {width}, float32; packs of recorded responses, blocks of "
        "4, 2.28 tokens a step. Times: ms of ours (times of dense relative to it). Memory: dense "
        "attention's with its mask. Error against float64, ours and dense: largest absolute one of "
        f"values, largest relative (Frobenius) one of the three gradients. Providers in turn in "
        f"one process, {found['rounds']} calls of each.\n"
        f"{_where(found)}\n"
    )
    for pack in dict.fromkeys(case["pack"] for case in found["cases"]):
        cases = [case for case in found["cases"] if case["pack"] == pack]
        header = ["rows"]
        for one in cases[0]["times"]:
            if one["provider"] == "ours":
                plural = "s" * (one["threads"] > 1)
                header.append(f"{one['work']}, {one['threads']} thread{plural}")
        header += ["extra MB", "dense, extra MB", "error of values", "of gradients"]
        text += f"\n{pack}:\n\n" + table(header, [_attention_row(case) for case in cases])
    return text


def tree_section(found: dict[str, Any]) -> str:
    """TreePO's passes on packed trees against separate sequences."""
    model = found["model"]
    rows = [
        [
            case["shape"],
            *(str(case[name]) for name in ("flat", "unique")),
            f"{case['sharing']:.2f}",
            *(ms(case["seconds"][name]["cpu_s"]["least"]) for name in ("separate", "packed")),
            f"{case['over_proportional']:.2f}",
            f"{case['difference']['loss']:.1e}, {case['difference']['gradient']:.1e}",
        ]
        for case in found["cases"]
    ]
    header = ["tree", "S", "U", "S/U", "separate, ms", "packed, ms", "packed / (U/S separate)"]
    return (
        "## TreePO's step on packed trees\n\n"
        f"One tree of {found['leaves']} leaves, forward, loss and backward; Qwen3's backbone of "
        f"width {model['hidden_size']}, {model['num_hidden_layers']} layers, "
        f"{model['vocab_size']} tokens, float32. Separate: each leaf a sequence, S tokens in all, "
        "prompts included. Packed: each of U tokens once. The ratio is 1 where time is "
        "proportional to tokens; attention sees more keys per token in a tree's pack. Difference: "
        "of the loss, and of the gradient, relative. Process CPU time of one thread, least of "
        f"{found['rounds']}.\n{_where(found)}\n\n" + table([*header, "difference"], rows)
    )


def _attention_row(case: Case) -> list[str]:
    cells = [str(case["rows"])]
    for one in case["times"]:
        if one["provider"] == "ours":
            same = (one["threads"], one["work"])
            dense = next(
                o
                for o in case["times"]
                if o["provider"] == "dense" and (o["threads"], o["work"]) == same
            )
            cells.append(f"{ms(_seconds(one))} ({ratio(_seconds(dense), _seconds(one))})")
    cells += [f"{case['extra_bytes'][name] / 1e6:.1f}" for name in ("ours", "dense")]
    errors = case.get("errors")
    if errors is None:
        return [*cells, "-", "-"]
    values = ", ".join(f"{errors[name]['out'][0]:.1e}" for name in ("ours", "dense"))
    gradients = ", ".join(
        f"{max(errors[name][key][1] for key in ('dq', 'dk', 'dv')):.1e}"
        for name in ("ours", "dense")
    )
    return [*cells, values, gradients]


def mean_field_section(found: dict[str, Any]) -> str:
    """One forward per prompt against one per rollout."""
    ways = ("shared", "per rollout", "released")
    rows = [
        [
            row["size"],
            f"{row['prompt']} + {row['window']}",
            *(ms(row["seconds"][way]) for way in ways),
            f"{row['per_rollout_over_shared']:.1f}",
            f"{row['released_over_shared']:.1f}",
            f"{row['loss_differs_by']:.0e}, {row['gradient_differs_by']:.0e}",
        ]
        for row in found["rows"]
    ]
    first = found["rows"][0]
    header = ["size", "tokens", *(f"{way}, ms" for way in ways)]
    header += ["per rollout / shared", "released / shared", "difference"]
    return (
        "## IGPO's likelihood stage\n\n"
        f"Old and reference log-probabilities of {found['group']} rollouts of one prompt, and "
        f"{found['epochs']} passes of forward, loss and backward; width {first['width']}, "
        f"{first['vocabulary']} tokens in the vocabulary, float32. Shared: one row for the prompt. "
        "Per rollout: a row for each, old and reference passes made once; released: made for "
        "every pass, as the released code does. Difference: of the loss, and of the gradient, "
        f"relative. Process CPU time, median of {found['rounds']}, {found['threads']} thread(s), "
        f"torch {found['versions']['torch']}. Command: `python benches/mean_field_update.py`."
        "\n\n" + table(header, rows)
    )
