"""Let a model write: continue a prompt, or answer it with --chat."""

from __future__ import annotations

import argparse
import sys

from qattn.cli import _common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what to write, and how."""
    parser.add_argument("prompt", help="text to continue, @FILE for what is in a file, or - for standard input")
    parser.add_argument(
        "--model", metavar="PATH", help="GGUF file (default: SmolLM2-135M-Instruct, fetched on first use)"
    )
    parser.add_argument("--chat", action="store_true", help="answer the prompt, by the model's chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message of the chat")
    parser.add_argument(
        "--max-tokens", type=int, default=200, metavar="N", help="tokens to write at most (default: 200)"
    )
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy (default: 0.8)")
    parser.add_argument(
        "--top-k", type=int, default=40, metavar="K", help="choose among K tokens; 0: all (default: 40)"
    )
    parser.add_argument(
        "--top-p", type=float, default=0.95, metavar="P", help="total probability to keep (default: 0.95)"
    )
    parser.add_argument(
        "--min-p", type=float, default=0.05, metavar="P", help="least share of the best (default: 0.05)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed writes the same text (default: random)")
    _common.add_model_options(parser)


def run(args: argparse.Namespace) -> None:
    """Stream the text to standard output, and then the speed to standard error."""
    from qattn.models import Sampler

    sampler = Sampler(args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p, seed=args.seed)
    if args.system is not None and not args.chat:
        raise ValueError("--system is a message of a chat; add --chat")
    prompt = _common.text_or_file(args.prompt)
    if not prompt:
        raise ValueError("the prompt is empty; give the model something to continue")
    model = _common.load(args.model, args, window_caches=True)
    _common.replace_unprintable()
    if args.chat:
        system = [] if args.system is None else [{"role": "system", "content": args.system}]
        tokens = model.chat_prompt([*system, {"role": "user", "content": prompt}])
        generation = model.generate(tokens, max_tokens=args.max_tokens, sampler=sampler)
    else:
        generation = model.generate(prompt, max_tokens=args.max_tokens, sampler=sampler)
        sys.stdout.write(prompt)
    try:
        sys.stdout.flush()
        for piece in generation:
            sys.stdout.write(piece)
            sys.stdout.flush()
    finally:
        sys.stdout.write("\n")
        sys.stdout.flush()
        prompt_tokens, more = len(generation.prompt_tokens), ", compiling included" if args.compiling else ""
        _common.say(f"prompt: {prompt_tokens} tokens, {_common.rate(prompt_tokens, generation.prompt_seconds)}{more}")
        _common.say(
            f"generation: {len(generation.tokens)} tokens, {_common.rate(generation.steps, generation.seconds)}{more}"
        )
