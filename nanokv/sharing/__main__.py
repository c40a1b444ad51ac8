"""`python -m nanokv.sharing search --model M --layers 8` searches for layers that can share a cache and writes the
map.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nanokv import cli, streams
from nanokv.files import check_outputs
from nanokv.llm import load
from nanokv.sharing.kvsharer import KVSharer
from nanokv.sharing.search import map_file
from weights.registry import DEFAULT, settings

PROGRAM = "nanokv.sharing"


def main(argv: Sequence[str]) -> int:
    p = cli.Parser(prog=PROGRAM, description="Find the layers that can share their cache (KVSharer).")
    a = p.add_argument
    a("what", choices=("search",))
    a("--model", default=DEFAULT, metavar="M")
    a("--layers", type=int, default=KVSharer.layers, metavar="N", help="how many layers own no cache")
    a("--threshold", type=float, default=KVSharer.threshold, metavar="C", help="least cosine of the model's output")
    a("--order", default=KVSharer.order, metavar="O", help="dissimilar; or similar or random, as controls")
    a("--out", metavar="FILE", help="the map; by default where kvsharer:layers=N looks for it")
    a("--device", default="auto", metavar="D")
    a("--dtype", default="auto", metavar="T")
    streams.prepare()
    args = p.parse_args(argv)
    return cli.exits(PROGRAM, lambda: run(args), need_less_memory="give a smaller model")


def run(args: argparse.Namespace) -> int:
    check_outputs({"--out": args.out}, {})
    want = KVSharer(layers=args.layers, threshold=args.threshold, order=args.order)
    llm = load(args.model, device=args.device, dtype=args.dtype, bar=cli.shows_progress())
    file = Path(args.out) if args.out else map_file(settings().weights, llm.fingerprint(), want)
    share = llm.search(want, file, lambda pair: print(pair, flush=True))
    print("in the end: " + ", ".join(f"{i} reads {o}" for i, o in sorted(share.items())))
    print(f"{len(share)} of {llm.config.num_hidden_layers} layers own no cache; wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
