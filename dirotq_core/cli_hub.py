"""``dirotq card`` and ``dirotq push``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_EVALUATION = "report.json of an evaluation of the model, or its folder; its metrics go into the card"


def add_parsers(commands: Any) -> None:
    """Add the commands to the parser's commands."""
    card = commands.add_parser(
        "card",
        help="write a checkpoint's model card",
        description="Write README.md into the folder of a quantized model: metadata for the Hub, method, size, how to "
        "load it, what was measured. A README.md that you wrote is left as it is.",
    )
    card.add_argument("path", type=Path, metavar="PATH", help="a quantized transformer or pipeline")
    card.add_argument("--base-model", metavar="ID", help="Hub id of the dense model, which the licence is taken from")
    card.add_argument("--evaluation", type=Path, metavar="PATH", help=_EVALUATION)
    card.add_argument("--repo-id", metavar="OWNER/NAME", help="where the model will be on the Hub, for the examples")
    card.set_defaults(run=_card)

    push = commands.add_parser(
        "push",
        help="upload a checkpoint to the Hub",
        description="Upload a quantized model with its model card. The access token is that of `hf auth login` or "
        "HF_TOKEN; HF_ENDPOINT names another server.",
    )
    push.add_argument("path", type=Path, metavar="PATH", help="a quantized transformer or pipeline, or a single file")
    push.add_argument("repo_id", metavar="OWNER/NAME", help="repository; made if it does not exist")
    push.add_argument("--base-model", metavar="ID", help="Hub id of the dense model (default: what the files say)")
    push.add_argument("--evaluation", type=Path, metavar="PATH", help=_EVALUATION)
    push.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    push.add_argument(
        "--gated", choices=("auto", "manual", "no"), help="of the repository (default: a new one as its base model is)"
    )
    push.add_argument("--revision", metavar="BRANCH", help="branch to push to (default: main)")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead of pushing")
    push.add_argument("--message", help="of the commit")
    push.set_defaults(run=_push)


def _card(args: argparse.Namespace) -> None:
    from .base_model import look_up, named_id
    from .card import write_card
    from .hub import base_of_files

    base = look_up(named_id(args.base_model) if args.base_model else base_of_files(args.path))
    written = write_card(args.path, base, args.repo_id, evaluation=args.evaluation)
    print(written or f"{args.path / 'README.md'} is yours and stays as it is")


def _push(args: argparse.Namespace) -> None:
    from .hub import push

    gated = False if args.gated == "no" else args.gated
    print(
        push(
            args.path, args.repo_id, base_model=args.base_model, private=args.private, gated=gated,
            revision=args.revision, create_pr=args.create_pr, commit_message=args.message,
            evaluation=args.evaluation,
        )
    )  # fmt: skip
