"""`python -m ftexp.show data ...`: the rows as the model will see them.

Takes the overrides of `ftexp.run`. Supervised tokens are green on a terminal and stand in ⟦ ⟧ elsewhere; special
tokens are spelled out, line ends and tabs have a sign. Of a pair both answers are shown, each with its prompt. The
sealed test rows, and those of them that are longer than `data.max_length`, are counted and never shown.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from ftexp import data, experiment, model, verb
from ftexp.api import compose
from ftexp.config import Data, Method, Packing, Run, require
from ftexp.data import gates, prompts
from ftexp.data.prompts import Example
from ftexp.data.shapes import Row
from ftexp.errors import MachineError
from ftexp.progress import quiet_libraries
from ftexp.train import answers, classify

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BINS = 12
BAR = 50
"""Letters of the longest bar."""
SIGNS = str.maketrans({"\n": "⏎\n", "\t": "⇥", "\r": "␍"})
ASKED, LEARNED, SPECIAL = "dim", "bold green", "reverse"


def spans(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool, bool]]:
    """Cut a row where supervision or special tokens begin and end: text, supervised, special."""
    special = set(tokenizer.all_special_ids)
    found: list[tuple[list[int], bool, bool]] = []
    for token, label in zip(example.ids, example.labels, strict=True):
        learned, spelled = label != -100, token in special
        if not found or found[-1][1:] != (learned, spelled) or spelled:
            found.append(([], learned, spelled))
        found[-1][0].append(token)
    return [(str(tokenizer.decode(ids)), learned, spelled) for ids, learned, spelled in found]


def coloured(example: Example, tokenizer: PreTrainedTokenizerBase, brackets: bool) -> Text:
    """Return a row as text with colours, and with brackets where there are none."""
    text, before = Text(), False
    for part, learned, special in [*spans(example, tokenizer), ("", False, False)]:
        if brackets and learned != before:
            text.append("⟦" if learned else "⟧")
        text.append(part.translate(SIGNS), f"{LEARNED if learned else ASKED}{f' {SPECIAL}' if special else ''}")
        before = learned
    return text


def histogram(lengths: list[int]) -> list[tuple[int, int, int]]:
    """Count lengths in at most `BINS` bins of equal whole width: first length, last length, rows.

    >>> histogram([1, 2, 2, 40])
    [(1, 4, 3), (5, 8, 0), (9, 12, 0), (13, 16, 0), (17, 20, 0), (21, 24, 0), (25, 28, 0), (29, 32, 0), (33, 36, 0), \
(37, 40, 1)]
    """
    low, high = min(lengths), max(lengths)
    width = -(-(high - low + 1) // BINS)
    bins = [0] * ((high - low) // width + 1)
    for length in lengths:
        bins[(length - low) // width] += 1
    return [(low + n * width, low + (n + 1) * width - 1, count) for n, count in enumerate(bins)]


def loaded(run: Run) -> data.Splits:
    """Load the rows of a run.

    Raises:
        ConfigError: the method cannot use such rows.
        DataError: a row cannot be used.
    """
    experiment.check_columns(run)
    experiment.check_lengths(run)
    splits = data.load(run.data)
    experiment.check_shape(run, splits)
    return splits


def rendered(rows: tuple[Row, ...], tokenizer: PreTrainedTokenizerBase, run: Run) -> list[tuple[Example, ...]]:
    """Render rows as training does, of a pair the better answer and the worse one.

    Of a classifier and a reward model the texts alone, for what they learn is no tokens.

    Raises:
        DataError: a row cannot be used.
    """
    if run.trainer.kind is Method.classify:
        return [(Example(e.row, e.ids, ()),) for e in classify.render(rows, tokenizer, run)]
    if run.trainer.kind not in answers.KINDS:
        return [(example,) for example in prompts.render(rows, tokenizer, run.data)]
    pairs = [(pair.chosen, pair.rejected) for pair in answers.render(rows, tokenizer, run.data)]
    if run.trainer.kind is Method.dpo:
        return [*pairs]
    return [tuple(Example(e.row, tuple(e.ids), ()) for e in pair) for pair in pairs]


def show(run: Run, console: Console, rows: int, split: str, png: Path | None) -> None:
    """Print counts, rows and lengths of the data of a run.

    Raises:
        FtexpError: the run would be refused for its data; all that can be shown is shown first.
    """
    splits = loaded(run)
    tokenizer = model.tokenizer(run.model)
    lenient = _lenient(run)
    parts = {"train": splits.train, "valid": splits.valid}
    made = {name: rendered(part, tokenizer, lenient) for name, part in parts.items()}
    for example, *worse in made[split][:rows]:
        console.rule(f"{split}  {example.row.where}  {_count(example)}", align="left")
        console.print(coloured(example, tokenizer, brackets=not console.is_terminal), soft_wrap=True)
        if worse:
            console.print(f"rejected: {_count(worse[0])}", highlight=False)
            console.print(coloured(worse[0], tokenizer, brackets=not console.is_terminal), soft_wrap=True)
        if run.trainer.kind is Method.classify:
            console.print(Text(f"labels: {example.row.completion}", LEARNED), soft_wrap=True)
    console.rule()
    dropped = ", ".join(f"{count} {reason} copies left out" for reason, count in splits.dropped().items())
    console.print(
        f"rows: {splits.read} read = {len(splits.train)} train + {len(splits.valid)} valid + {len(splits.test)} test"
        + (f"; {dropped}" if dropped else ""), highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    shown = [row for part in made.values() for row in part]
    _lengths(console, shown, run.data)
    if splits.test:
        over = too_long(splits.test, tokenizer, run)
        told = f"{over} of {len(splits.test)} sealed rows have more" + (
            f"; by ftexp confirm they are {_fate(run.data)}" if over else ""
        )
        console.print(told, highlight=False, soft_wrap=True)
    if png is not None:
        what = "answers" if run.trainer.kind in answers.KINDS else "rows"
        picture([example for row in shown for example in row], run.data, png, what)
        console.print(f"picture: {png}", highlight=False, markup=False)
    gates.near_leaks(splits, run.data)
    for part in parts.values():
        rendered(part, tokenizer, run)


def _lenient(run: Run) -> Run:
    """Return a run that takes rows of any length, to count what it would not take."""
    return replace(run, data=replace(run.data, max_length=1 << 20))


def too_long(rows: tuple[Row, ...], tokenizer: PreTrainedTokenizerBase, run: Run) -> int:
    """Count rows that have more than `data.max_length` tokens; of a pair the longer answer counts.

    Raises:
        DataError: a row cannot be used, whatever its length.
    """
    made = rendered(rows, tokenizer, _lenient(run))
    return sum(max(len(example.ids) for example in row) > run.data.max_length for row in made)


def _fate(how: Data) -> str:
    """Say what becomes of rows that are too long."""
    torn = how.packing is Packing.wrapped
    return "torn" if torn else {"refuse": "refused", "drop": "dropped", "cut": "cut"}[how.long.value]


def _count(example: Example) -> str:
    return f"{len(example.ids) - example.supervised} + {example.supervised} supervised tokens"


def counted(run: Run, rows: int, split: str) -> dict[str, Any]:
    """Sum the data of a run up for scripts: rows, lengths in tokens, and the first rows token by token.

    Tokens of pairs are those of both answers, each with its prompt. Of sealed rows nothing but counts is told.

    Raises:
        FtexpError: the run would be refused for its data.
    """
    splits = loaded(run)
    tokenizer = model.tokenizer(run.model)
    gates.near_leaks(splits, run.data)
    sides = {"train": splits.train, "valid": splits.valid}
    made = {name: rendered(part, tokenizer, run) for name, part in sides.items()}
    parts = {}
    for name, part in made.items():
        each = [example for row in part for example in row]
        parts[name] = {
            "rows": len(part), "tokens": sum(len(e.ids) for e in each), "supervised": sum(e.supervised for e in each),
            "longest": max((len(e.ids) for e in each), default=0),
        }  # fmt: skip

    def told(example: Example) -> dict[str, Any]:
        cut = [{"text": text, "supervised": learned, "special": special}
               for text, learned, special in spans(example, tokenizer)]  # fmt: skip
        return {"tokens": len(example.ids), "supervised": example.supervised, "spans": cut}

    shown = [
        {"where": example.row.where, **told(example), **({"rejected": told(worse[0])} if worse else {})}
        for example, *worse in made[split][:rows]
    ]
    sealed = {"rows": len(splits.test), "too_long": too_long(splits.test, tokenizer, run) if splits.test else 0}
    return {
        "read": splits.read, **parts, "test": sealed, "dropped": splits.dropped(),
        "max_length": run.data.max_length, split + "_rows": shown,
    }  # fmt: skip


def _lengths(console: Console, rows: list[tuple[Example, ...]], how: Data) -> None:
    examples = [example for row in rows for example in row]
    lengths = sorted(len(example.ids) for example in examples)
    learned = sum(example.supervised for example in examples)
    told = {name: lengths[min(len(lengths) - 1, int(share * len(lengths)))]
            for name, share in (("least", 0), ("median", 0.5), ("95 %", 0.95), ("most", 1))}  # fmt: skip
    spread = ", ".join(f"{name} {value}" for name, value in told.items())
    share = f", {learned / sum(lengths):.1%} supervised" if learned else ""  # a head learns no tokens
    what = "a row" if len(examples) == len(rows) else "an answer with its prompt"
    console.print(f"tokens: {sum(lengths)}{share}; {what} has {spread}", highlight=False, soft_wrap=True)
    counts = histogram(lengths)
    widest, most = len(str(counts[-1][1])), max(count for *_, count in counts)
    for first, last, count in counts:
        bar = "█" * max(round(count / most * BAR), int(count > 0))
        style = "red" if first > how.max_length else "green"
        console.print(Text.assemble(f"{first:>{widest}}-{last:<{widest}} ", (bar, style), f" {count}" if count else ""))
    over = sum(max(len(example.ids) for example in row) > how.max_length for row in rows)
    console.print(f"{over} rows have more than data.max_length={how.max_length} tokens"
                  + (f" and are {_fate(how)}" if over else ""), highlight=False)  # fmt: skip


def picture(examples: list[Example], how: Data, path: Path, what: str = "rows") -> None:
    """Draw the lengths of rows, or of `what` they are, and of what is supervised in them, as a PNG file.

    Raises:
        MachineError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MachineError("--png needs the package matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    whole, learned = [len(example.ids) for example in examples], [example.supervised for example in examples]
    for lengths, label in ((whole, "whole"), (learned, "supervised")):
        axes.hist(lengths, bins=40, range=(0, max(whole)), label=label, alpha=0.7)
    if max(whole) > 0.5 * how.max_length:
        axes.axvline(how.max_length, color="red", label="data.max_length")
    axes.set(xlabel="tokens", ylabel=what)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")
    pyplot.close(figure)


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="ftexp show", description="Show the rows as the model will see them.")
    parser.add_argument("what", choices=["data"])
    parser.add_argument("overrides", nargs="*", help="as for ftexp.run, such as data=file data.path=my.csv")
    parser.add_argument("--config-dir", metavar="DIR", help="folder with options of your own, as experiment/mine.yaml")
    parser.add_argument("--rows", type=int, default=3, help="rows to print (default: %(default)s)")
    parser.add_argument("--split", choices=["train", "valid"], default="train", help="default: %(default)s")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--json", action="store_true", help="one JSON object on stdout; a refused row is an error alone")
    way.add_argument("--png", type=Path, help="file for a picture of the lengths")
    args = parser.parse_intermixed_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    quiet_libraries()
    return verb.ended(lambda: _main(args))


def _main(args: argparse.Namespace) -> int:
    require(args.rows >= 0, "--rows", args.rows, "0 or more")
    own = [] if args.config_dir is None else [f"--config-dir={args.config_dir}"]
    run = compose([*args.overrides, *own], "ftexp show")
    if args.json:
        print(verb.as_json(counted(run, args.rows, args.split)))
        return 0
    show(run, Console(), args.rows, args.split, args.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
