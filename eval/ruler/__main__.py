"""Measure RULER's thirteen tasks with dense and sparse attention; the samples are generated here.

    python -m minicpm4_hf.eval ruler --lengths 2048 4096 --samples 10 --output ruler.json
    python -m minicpm4_hf.eval ruler --model ./MiniCPM4-8B --lengths 4096 32768 --samples 500 --output ruler.json
    python -m minicpm4_hf.eval ruler --model ./MiniCPM4-8B --context 131072 --lengths 131072 --tasks niah_single_2
    python -m minicpm4_hf.eval ruler --squad dev-v2.0.json --hotpotqa hotpot_dev_distractor_v1.json --tasks qa_1 qa_2

Prints a table and, as the last line, the record as one JSON document. With --output the record is also written there;
every sample's answer is added to the file of the same name that ends in .jsonl as it is measured, and the same command
goes on from there. --text is the prose that needles are hidden in (default: the excerpt of Dracula that comes with the
package). Without --squad and --hotpotqa the questions of qa_1 and qa_2 are generated; their scores are not RULER's.
Below a checkpoint's `dense_len` sparse attention is dense. With --depths the record has a grid of lengths and depths,
which `python -m minicpm4_hf.eval.memory heatmap RECORD.json --output FIGURE.png` draws.

The exit code is 0, or 2 with one sentence on stderr when the input is wrong.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch

from minicpm4_cli.loading import add_device_arguments, parse_sparse, positive_int, quiet
from minicpm4_hf.eval.command_line import run_command
from minicpm4_hf.eval.memory.cases import Journal, run_plan
from minicpm4_hf.eval.memory.subject import MODES, Subject, load_subject, read_texts
from minicpm4_hf.eval.mup.__main__ import count
from minicpm4_hf.kernels.bench.__main__ import write_atomically
from minicpm4_hf.shipped import shipped_excerpt

from .fitting import FORMATS, Generator, choose_format
from .plan import describe_ruler, plan_ruler
from .questions import generate_questions, read_hotpot, read_squad
from .record import begin_record, check_resumable, owner_of
from .source import Source
from .tasks import DEPTH_TASKS, TASKS

BENCHMARK = "ruler"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog=f"python -m minicpm4_hf.eval {BENCHMARK}",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", metavar="PATH_OR_ID", help="a checkpoint, shipped or not (default: minicpm4-books)")
    parser.add_argument("--lengths", type=positive_int, nargs="+", default=[4096], metavar="N", help="tokens a sample")
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="NAME", help=f"of {', '.join(TASKS)}"
    )
    parser.add_argument(
        "--samples", type=positive_int, default=50, metavar="N", help="a task and length (default: 50; RULER's: 500)"
    )
    parser.add_argument(
        "--depths",
        type=positive_int,
        metavar="N",
        help=f"a grid: needles at N depths in turn, for one of {', '.join(DEPTH_TASKS)}",
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="attention (default: both)")
    parser.add_argument(
        "--sparse", nargs="*", metavar="KEY=VALUE", help="what sparse is, in place of the checkpoint's settings"
    )
    parser.add_argument("--context", type=positive_int, metavar="N", help="extend the context to N tokens (LongRoPE)")
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="prose for the haystacks, UTF-8")
    parser.add_argument("--squad", type=Path, metavar="FILE", help="dev-v2.0.json, for qa_1")
    parser.add_argument("--hotpotqa", type=Path, metavar="FILE", help="hotpot_dev_distractor_v1.json, for qa_2")
    parser.add_argument(
        "--format", choices=FORMATS, default="auto", help="of prompts (default: a chat where there is a template)"
    )
    parser.add_argument("--seed", type=count, default=0, metavar="N", help="of the samples (default: 0)")
    add_device_arguments(parser)
    parser.add_argument("--threads", type=positive_int, metavar="N", help="default: torch's choice")
    parser.add_argument("--output", type=Path, metavar="RECORD.json", help="write the record here; go on from there")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raises `ValueError` for what can be found wrong before anything is loaded."""
    if args.output and not args.output.parent.is_dir():
        raise ValueError(f"The folder of {str(args.output)!r} does not exist.")
    if args.output and args.output.suffix != ".json":
        raise ValueError(f"`--output` must be a file that ends in .json, got {str(args.output)!r}.")
    for name in ("lengths", "tasks", "modes"):
        values = getattr(args, name)
        if len(set(values)) < len(values):
            raise ValueError(f"`--{name}` must name each value once, got {' '.join(map(str, values))}.")
    if args.depths and not (len(args.tasks) == 1 and args.tasks[0] in DEPTH_TASKS):
        raise ValueError(
            f"`--depths` needs `--tasks` with one of {', '.join(DEPTH_TASKS)}, got {' '.join(args.tasks)}."
        )
    if args.depths and args.samples % args.depths:
        raise ValueError(f"`--samples` must be a multiple of `--depths` {args.depths}, got {args.samples}.")
    parse_sparse(args.sparse)


def read_source(args: argparse.Namespace) -> tuple[Source, list]:
    """The text and the questions that the arguments name, and the text files.

    Raises:
        ValueError, OSError: files that are not what they must be.
    """
    texts = read_texts(args.text or [shipped_excerpt()])
    prose = Source("\n".join(text.content.decode("utf-8") for text in texts), {})
    given = {"qa_1": (args.squad, read_squad), "qa_2": (args.hotpotqa, read_hotpot)}
    questions = {
        task: read(path) if path else generate_questions(task, prose.words, args.seed)
        for task, (path, read) in given.items()
        if task in args.tasks
    }
    return Source(prose.text, questions), texts


def settings_of(args: argparse.Namespace, generator: Generator, subject: Subject) -> dict:
    """What figures depend on besides the model."""
    names = ("lengths", "tasks", "samples", "modes", "seed", "depths", "context")
    questions = {task: found.name for task, found in generator.source.questions.items()}
    return {
        **{name: getattr(args, name) for name in names},
        "format": generator.style,
        "questions": questions,
        "threads": torch.get_num_threads(),
        "dtype": subject.identity["dtype"],
    }


def spell_command(args: argparse.Namespace, subject: Subject) -> str:
    """The command with every setting in it, of the paths the last component."""
    words = ["python", "-m", "minicpm4_hf.eval", BENCHMARK]
    words += ["--model", subject.name] if args.model else []
    words += ["--sparse", *args.sparse] if args.sparse is not None else []
    words += ["--context", str(args.context)] if args.context else []
    for name in ("text", "squad", "hotpotqa"):
        paths = getattr(args, name)
        if paths:
            words += [f"--{name}", *(path.name for path in (paths if isinstance(paths, list) else [paths]))]
    words += ["--device", subject.identity["device"], "--dtype", subject.identity["dtype"]]
    words += ["--threads", str(torch.get_num_threads()), "--format", args.format, "--seed", str(args.seed)]
    words += ["--samples", str(args.samples)]
    words += ["--depths", str(args.depths)] if args.depths else []
    for name in ("lengths", "modes", "tasks"):
        words += [f"--{name}", *map(str, getattr(args, name))]
    return shlex.join(words)


def run_ruler(args: argparse.Namespace) -> dict:
    """Measure what the arguments name, print the table and give the record.

    Raises:
        ValueError, OSError: wrong input.
    """
    source, texts = read_source(args)
    with quiet():
        subject = load_subject(
            args.model, sparse=args.sparse, device=args.device, dtype=args.dtype, context=args.context
        )
        if "sparse" in args.modes and subject.sparse_config is None:
            raise ValueError(
                f"{subject.name!r} has no sparse attention (its `sparse_config` is null): give settings with "
                "`--sparse`, or run with `--modes dense`."
            )
        style = choose_format(args.format, subject.tokenizer)
        generator = Generator(source, subject.tokenizer, style, args.seed, args.depths)
        settings = settings_of(args, generator, subject)
        record = begin_record(BENCHMARK, subject, texts, spell_command(args, subject), settings)
        check_resumable(args.output, record)
        names = ("lengths", "tasks", "samples", "modes")
        plan = plan_ruler(subject, generator, **{name: getattr(args, name) for name in names})
        journal = Journal(args.output and args.output.with_suffix(".jsonl"), owner_of(record))
        if args.output and not args.output.exists():  # so that whoever goes on knows the commit
            write_atomically(args.output, json.dumps({**record, "rows": []}) + "\n")
        figures = run_plan(BENCHMARK, plan, journal)
    record = {**record, **figures}
    if args.output:
        write_atomically(args.output, json.dumps(record, allow_nan=False) + "\n")
    print(describe_ruler(figures), flush=True)
    return record


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)

    def measure() -> None:
        check_arguments(args)
        print(json.dumps(run_ruler(args), allow_nan=False))

    return run_command(measure, threads=args.threads)


if __name__ == "__main__":
    sys.exit(main())
