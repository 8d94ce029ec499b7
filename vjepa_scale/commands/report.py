"""Write a report of runs, or of a recipe before it is launched, as one HTML file that loads nothing else.

python tools/report.py RUN [--out report.html]           one run, at any time: curves, masks, features, results
python tools/report.py RUN RUN …                         several runs: curves over each other, and how recipes differ
python tools/report.py --preview recipes/vitb_1gpu.yaml [key=value …]     clips with masks, schedules, mixture, plan
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from vjepa_scale.core.errors import UserError, run_command
from vjepa_scale.core.installed import as_called, run_console_command


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=as_called(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders; with --preview: overrides key=value")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/report.html; otherwise ./report.html")
    parser.add_argument("--preview", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    features = parser.add_mutually_exclusive_group()
    features.add_argument(
        "--features", action="store_true", default=None, help="draw features of a large encoder on a CPU, too"
    )
    features.add_argument("--no-features", action="store_false", dest="features", help="leave features out")
    arguments = parser.parse_intermixed_args(argv)
    if not arguments.runs and arguments.preview is None:
        raise UserError("nothing to report on", where="command line", fix="give a run folder, or --preview RECIPE")
    if arguments.features is not None and (arguments.preview is not None or len(arguments.runs) > 1):
        option = "--features" if arguments.features else "--no-features"
        raise UserError("only the report of one run draws features", where=option, fix="leave it out")
    out = write(arguments)
    print(f"written: {out} ({out.stat().st_size / 1e6:.1f} MB)")
    return 0


def write(arguments: argparse.Namespace) -> Path:
    """Writes the report that the command line asks for, and returns its path."""
    from vjepa_scale.report.write import write_comparison, write_preview, write_run_report

    words: list[str] = arguments.runs
    if arguments.preview is not None:
        out = arguments.out or Path("report.html")
        write_preview(arguments.preview, words, out)
    elif len(words) > 1:
        out = arguments.out or Path("report.html")
        write_comparison([Path(word) for word in words], out)
    else:
        out = arguments.out or Path(words[0]) / "report.html"
        write_run_report(Path(words[0]), out, features=arguments.features)
    return Path(out)


def run() -> NoReturn:
    """The console command."""
    run_console_command(main)


if __name__ == "__main__":
    run_command(main)
