"""Convert a checkpoint: ternary, int4, GGUF, and the layouts of other runtimes.

minicpm4 convert ternary ./BitCPM4-1B ./BitCPM4-1B-packed
minicpm4 convert int4 ./MiniCPM4-8B ./MiniCPM4-8B-int4 --dry-run
minicpm4 convert legacy ./MiniCPM4-8B ./MiniCPM4-8B-hf --json
"""

import argparse

# Subcommand -> (module of the package minicpm4_hf.conversion, what it does).
CONVERSIONS = {
    "ternary": ("ternary", "pack ternary weights at two bits each, or quantise to them"),
    "int4": ("int4", "quantise to 4 bits by GPTQ and its variants for MiniCPM4"),
    "gguf": ("gguf", "one GGUF file for llama.cpp"),
    "llama": ("llama", "fold the scales into the weights, for runtimes that know only Llama"),
    "legacy": ("hf", "between the official and the minicpm4 layout, from the one that IN has"),
    "to-hf": ("hf", "official layout -> minicpm4 layout, with remote code"),
    "to-official": ("hf", "minicpm4 layout -> official layout (model type minicpm)"),
    "draft": ("draft", "draft heads between CPM.cu, vLLM and this package"),
    "marlin": ("marlin", "GPTQ layout <-> Marlin layout for CPM.cu"),
    "freq": ("frequencies", "token frequencies of a text, for FR-Spec drafting"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The name of a conversion; what follows it is read by the conversion."""
    width = max(map(len, CONVERSIONS))
    names = "".join(f"\n  {name:{width}}  {what}" for name, (_, what) in CONVERSIONS.items())
    parser.description += f"\n\nconversions:{names}\n\n`minicpm4 convert CONVERSION --help` shows its settings."
    parser.add_argument("conversion", choices=CONVERSIONS, metavar="CONVERSION", help="one of the above")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="IN OUT", help="what is read, what is written, and settings"
    )


def run(args: argparse.Namespace) -> int:
    """Hand over to `python -m minicpm4_hf.conversion`."""
    from minicpm4_hf.conversion.__main__ import main

    return main([args.conversion, *args.arguments], prog="minicpm4 convert")
