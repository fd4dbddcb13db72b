"""The table that people read, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Title of the column, name of the measure, format.
COLUMNS = (
    ("PSNR", "psnr", ".2f"),
    ("SSIM", "ssim", ".3f"),
    ("LPIPS", "lpips", ".4f"),
    ("LPIPS / bicubic", "lpips_over_bicubic", ".3f"),
    ("identity", "identity", ".3f"),
    ("error", "error", ".2e"),
    ("error, clean", "error_clean", ".2e"),
    ("within", "within", ".1%"),
    ("within, all", "within_all", ".1%"),
    ("diversity", "diversity", ".4f"),
    ("count", "count", ".1%"),
    ("diversity, 2ε", "diversity_epsilon", ".4f"),
    ("count, 2ε", "count_epsilon", ".1%"),
    ("NIQE", "niqe", ".2f"),
    ("{frechet}", "frechet", ".4f"),
    ("{frechet}, sample", "frechet_sample", ".4f"),
    ("passes", "passes", ".1f"),
)
# Columns that are there only where a method has something for them.
OPTIONAL = ("niqe", "frechet", "frechet_sample")
GROUP_COLUMNS = (
    ("within", "within", ".1%"),
    ("within, all", "within_all", ".1%"),
    ("error", "error", ".2e"),
    ("LPIPS", "lpips", ".4f"),
)


def table(results: Mapping[str, Any]) -> str:
    """Writes the Markdown table of the contents of results.json.

    Args:
        results: What `evaluate.main` collects.

    Returns:
        Lines of text; "–" where a measure does not apply, "n/a" where its network is missing.
    """
    settings, networks = results["settings"], results["networks"]
    missing = {name for name, network in networks.items() if network is None}
    columns = [(title.format(frechet=networks["frechet"] or "Fréchet"), name, style) for title, name, style in COLUMNS]
    columns = [column for column in columns if _wanted(column[1], results)]
    lines = [
        f"{results['faces']} faces of {results['data']}, {results['resolution']} px, from "
        f"{'; '.join(settings.values())}, k = {results['k']}, seed {results['seed']}, "
        f"bundle {results['bundle']['name']} ({results['bundle']['hash'][:12]})",
        "",
        "| LR | method | " + " | ".join(title for title, _, _ in columns) + " | seconds |",
        "|---|---|" + "---:|" * (len(columns) + 1),
    ]
    for setting, methods in results["results"].items():
        for method, means in methods.items():
            cells = [
                "n/a" if name in missing else "–" if means.get(name) is None else format(float(means[name]), style)
                for _, name, style in columns
            ]
            seconds = results["timing"]["seconds_per_face"][setting][method]
            title = results["titles"].get(method, method)
            lines.append(f"| {settings[setting]} | {title} | {' | '.join(cells)} | {seconds:.4f} |")
    if results["unreadable"]:
        lines += ["", f"{len(results['unreadable'])} of them cannot be read and do not count: see results.json."]
    return "\n".join([*lines, *group_table(results), *attribute_table(results)]) + "\n"


def _wanted(name: str, results: Mapping[str, Any]) -> bool:
    """Leaves out columns that say nothing: no second one for errors without degradations, no empty optional ones."""
    if name == "error_clean":
        return any("_" in setting for setting in results["settings"])
    rows = [means for methods in results["results"].values() for means in methods.values()]
    if name in ("frechet", "frechet_sample") and results["frechet_wanted"]:
        return True
    return name not in OPTIONAL or any(means.get(name) is not None for means in rows)


def group_table(results: Mapping[str, Any]) -> list[str]:
    """Writes success and errors per group, with intervals."""
    lines: list[str] = []
    for column, settings in results.get("groups", {}).items():
        lines += ["", f"By {column}, with 95 % intervals:", ""]
        lines += [f"| LR | method | {column} | faces | " + " | ".join(t for t, _, _ in GROUP_COLUMNS) + " |"]
        lines += ["|---|---|---|" + "---:|" * (len(GROUP_COLUMNS) + 1)]
        for setting, methods in settings.items():
            for method, groups in methods.items():
                for group, row in groups.items():
                    cells = [
                        f"{row[name]:{style}} ({row[f'{name}_interval'][0]:{style}} – "
                        f"{row[f'{name}_interval'][1]:{style}})"
                        for _, name, style in GROUP_COLUMNS
                    ]
                    title = results["titles"].get(method, method)
                    start = f"| {results['settings'][setting]} | {title} | {group} | {row['faces']} | "
                    lines.append(start + " | ".join(cells) + " |")
    return lines


def attribute_table(results: Mapping[str, Any]) -> list[str]:
    """Writes how often each attribute is found in results and in truth."""
    lines: list[str] = []
    for setting, methods in results["results"].items():
        rates = {name: means["attributes"] for name, means in methods.items() if means.get("attributes")}
        if not rates:
            continue
        titles = [results["titles"].get(name, name) for name in rates]
        lines += [
            "",
            f"Attributes found in all candidates, {results['settings'][setting]} (agreement of best guess and truth):",
        ]
        lines += ["", "| attribute | truth | " + " | ".join(titles) + " |", "|---|---:|" + "---:|" * len(titles)]
        first = next(iter(rates.values()))
        for attribute in first:
            cells = [f"{own[attribute]['rate']:.1%} ({own[attribute]['agreement']:.1%})" for own in rates.values()]
            lines.append(f"| {attribute} | {first[attribute]['truth']:.1%} | {' | '.join(cells)} |")
    return lines
