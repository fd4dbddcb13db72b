"""The tables that people read, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Title of the column, name of the measure, format; see docs/results.md for what each is.
COLUMNS = (
    ("LR-PSNR", "lr_psnr", ".1f"),
    ("LR-PSNR, worst", "lr_psnr_worst", ".1f"),
    ("LR-PSNR, clean", "lr_psnr_clean", ".1f"),
    ("PSNR", "psnr", ".2f"),
    ("SSIM", "ssim", ".3f"),
    ("LPIPS", "lpips_point", ".4f"),
    ("LPIPS truth–draw", "lpips_draw", ".4f"),
    ("LPIPS draw–draw", "lpips_draws", ".4f"),
    ("best of k", "lpips_best", ".4f"),
    ("mean of k", "lpips_mean", ".4f"),
    ("ratio LPIPS", "ratio_lpips", ".2f"),
    ("ratio VGG11", "ratio_vgg11", ".2f"),
    ("ratio identity", "ratio_identity", ".2f"),
    ("NTIRE diversity", "ntire_diversity", ".1f"),
    ("identity", "identity_point", ".3f"),
    ("identity truth–draw", "identity_draw", ".3f"),
    ("identity draw–draw", "identity_draws", ".3f"),
    ("rank-1", "rank1_point", ".1%"),
    ("rank-1, draw", "rank1_draw", ".1%"),
    ("NIQE", "niqe", ".2f"),
    ("fd_vgg11", "fd_vgg11", ".4f"),
    ("kid_vgg11 · 10³", "kid_vgg11", "e3"),
    ("FID", "fid", ".2f"),
    ("nfe", "nfe", ".1f"),
)
GROUP_COLUMNS = (
    ("success", "success", ".1%"),
    ("LR-PSNR", "lr_psnr", ".1f"),
    ("LPIPS", "lpips", ".4f"),
    ("identity", "identity", ".3f"),
)


def table(results: Mapping[str, Any]) -> str:
    """Writes the Markdown tables of results.json, without columns that say nothing; "–" where one does not apply."""
    conditions, missing = results["conditions"], [name for name, there in results["networks"].items() if not there]
    columns = [column for column in COLUMNS if _wanted(column[1], results)]
    lines = [
        f"{results['faces']} faces of {results['data']}, {results['resolution']} px, from "
        f"{'; '.join(conditions.values())}, k = {results['k']}, seed {results['seed']}, {results['made_by']}",
        "",
        "| LR | method | " + " | ".join(title for title, _, _ in columns) + " | seconds |",
        "|---|---|" + "---:|" * (len(columns) + 1),
    ]
    for condition, rows in results["results"].items():
        for method, means in rows.items():
            cells = [_format(means.get(name), style) for _, name, style in columns]
            seconds = results["timing"]["seconds_per_face"].get(condition, {}).get(method)
            lines.append(f"| {conditions[condition]} | {method} | {' | '.join(cells)} | {_format(seconds, '.4f')} |")
    if results.get("lpips", "squeeze") != "squeeze":
        lines += ["", f"LPIPS on {results['lpips']}."]
    if missing:
        lines += ["", f"Left out for want of weights: {', '.join(missing)}."]
    if results["unreadable"]:
        lines += ["", f"{len(results['unreadable'])} more cannot be read: see results.json."]
    return "\n".join([*lines, *group_table(results), *attribute_table(results)]) + "\n"


def _format(value: float | None, style: str) -> str:
    if value is None:
        return "–"
    return format(value * 1e3, ".2f") if style == "e3" else format(value, style)


def _wanted(name: str, results: Mapping[str, Any]) -> bool:
    """Leaves out columns that say nothing."""
    if name == "lr_psnr_clean":
        return any("_" in condition for condition in results["conditions"])
    return any(means.get(name) is not None for rows in results["results"].values() for means in rows.values())


def group_table(results: Mapping[str, Any]) -> list[str]:
    """Writes success and errors per group, with intervals."""
    lines: list[str] = []
    for column, conditions in results.get("groups", {}).items():
        lines += ["", f"By {column}, of point estimates, with 95 % intervals:", ""]
        lines += [f"| LR | method | {column} | faces | " + " | ".join(t for t, _, _ in GROUP_COLUMNS) + " |"]
        lines += ["|---|---|---|" + "---:|" * (len(GROUP_COLUMNS) + 1)]
        for condition, methods in conditions.items():
            for method, groups in methods.items():
                for group, row in groups.items():
                    cells = [_with_interval(row, name, style) for _, name, style in GROUP_COLUMNS]
                    start = f"| {results['conditions'][condition]} | {method} | {group} | {row['faces']} | "
                    lines.append(start + " | ".join(cells) + " |")
    return lines


def _with_interval(row: Mapping[str, Any], name: str, style: str) -> str:
    if name not in row:
        return "–"
    low, high = row[f"{name}_interval"]
    return f"{row[name]:{style}} ({low:{style}} – {high:{style}})"


def attribute_table(results: Mapping[str, Any]) -> list[str]:
    """Writes how often each attribute is found in samples and in truth."""
    lines: list[str] = []
    for condition, methods in results["results"].items():
        rates = {name: means["attributes"] for name, means in methods.items() if means.get("attributes")}
        if not rates:
            continue
        lines += [
            "",
            f"Attributes found in all samples, {results['conditions'][condition]} (agreement of point estimate and "
            "truth):",
        ]
        lines += ["", "| attribute | truth | " + " | ".join(rates) + " |", "|---|---:|" + "---:|" * len(rates)]
        first = next(iter(rates.values()))
        for attribute in first:
            cells = [f"{own[attribute]['rate']:.1%} ({own[attribute]['agreement']:.1%})" for own in rates.values()]
            lines.append(f"| {attribute} | {first[attribute]['truth']:.1%} | {' | '.join(cells)} |")
    return lines
