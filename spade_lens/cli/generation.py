"""The command that writes text: ``generate``, as it stands, or compared with plain text."""

import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from spade_lens.cli import options as opt
from spade_lens.cli.options import DType, option, plain_errors

if TYPE_CHECKING:
    from spade_lens.generation import Generated, Sampling
    from spade_lens.generation.strategy import Strategy

_STRATEGY, _SAMPLING = "Strategy", "Sampling"


def generate(
    text: str = typer.Argument(help="The text to go on with."),
    max_new_tokens: int = option(64, "Tokens to write at most."),
    stop: list[str] | None = option(
        None, r"Where the text ends; repeat for several. \n is a line end. By default the model's."
    ),
    chat: bool = option(False, "Take the text as the message of a user in a chat.", "--chat"),
    compare: bool = option(
        False, "Compare with plain greedy text: tokens, acceptance, CPU time.", "--compare"
    ),
    strategy: str = option(
        "plain",
        "plain; lookup (drafts are n-grams of the text); exit:8 (drafts by the head at layer 8); "
        "prefill:24 (the prompt exits at layer 24); token-exit:21,24 (every token leaves at the "
        "first of these layers that is sure).",
        group=_STRATEGY,
    ),
    keep: str | None = option(
        None,
        "prefill: the tokens that go on above the exit, 'start+answer' or such as 'last 16'.",
        group=_STRATEGY,
    ),
    draft_tokens: int | None = option(
        None,
        "lookup, exit: tokens drafted in a round at most. By default 11 and 5.",
        group=_STRATEGY,
    ),
    eta: float | None = option(
        None, "exit: a draft ends after a token less probable than this.", group=_STRATEGY
    ),
    threshold: float | None = option(
        None, "token-exit: how sure the layer must be, by default 0.9.", group=_STRATEGY
    ),
    confidence: str | None = option(
        None,
        "token-exit: what is taken for it: top-1 (the default), margin, entropy, saturation.",
        group=_STRATEGY,
    ),
    temperature: float | None = option(None, "What logits are divided by.", group=_SAMPLING),
    top_k: int | None = option(None, "Draw from so many likeliest tokens.", group=_SAMPLING),
    top_p: float | None = option(
        None, "Draw from the likeliest tokens of this probability.", group=_SAMPLING
    ),
    seed: int | None = option(
        None, "Seed. Without any of these the likeliest token is taken.", group=_SAMPLING
    ),
    model: str = opt.MODEL,
    device: str = opt.DEVICE,
    dtype: DType = opt.DTYPE,
    debug: bool = opt.DEBUG,
) -> None:
    """Write text after a text; at a terminal, token by token."""
    with plain_errors(debug):
        numbers = {"temperature": temperature, "top-p": top_p, "eta": eta, "threshold": threshold}
        for name, number in numbers.items():
            if number != number:
                raise ValueError(f"--{name} nan was given; expected a number.")
        kind, layers = parse_strategy(strategy)
        if layers:
            opt.check_layers(model, layers)
        sampling = _sampling(temperature, top_k, top_p, seed)
        if compare and (sampling is not None or kind == "plain"):
            raise ValueError(
                "--compare is of a strategy and plain greedy text; give --strategy, and no "
                "--temperature, --top-k, --top-p or --seed."
            )
        given_options = {"keep": keep, "draft_tokens": draft_tokens, "eta": eta}
        given_options |= {"threshold": threshold, "confidence": confidence}
        chosen = _strategy(kind, layers, given_options)
        from spade_lens import generation
        from spade_lens.checks import check_number, visible
        from spade_lens.settings import Settings

        check_number("--max-new-tokens", max_new_tokens, least=1)
        if "" in (stop or ()):
            raise ValueError("--stop '' was given; expected a text of at least one character.")
        stops = [one.replace("\\n", "\n").replace("\\t", "\t") for one in stop or ()]
        loaded = opt.load_model(model, device, dtype)
        shared: dict[str, Any] = {"stop": stops or None, "strategy": chosen}
        given = [{"role": "user", "content": text}] if chat else text
        if compare:
            both = generation.compare(given, max_new_tokens=max_new_tokens, model=loaded, **shared)
            typer.echo(visible(both.written.texts[0]))
            typer.echo(f"\n{both}")
            return
        stream = Stream(loaded.tokenizer, stops) if is_terminal() else None
        written = loaded.generate(
            given,
            max_new_tokens,
            sampling=sampling,
            on_token=stream,
            settings=Settings(progress=False) if stream else None,
            **shared,
        )
        if stream is None:
            typer.echo(visible(written.texts[0]))
        else:
            stream.end(written.texts[0])
        typer.echo(_summary(written), err=True)


def parse_strategy(text: str) -> tuple[str, list[int]]:
    """Return a strategy's kind and its layers.

    Example:
        >>> parse_strategy("exit:8"), parse_strategy("token-exit:21,24"), parse_strategy("plain")
        (('exit', [8]), ('token-exit', [21, 24]), ('plain', []))
    """
    one, several = r"(exit|prefill):\d{1,4}", r"(token-exit):\d{1,4}(,\d{1,4})*"
    match = re.fullmatch(rf"(plain|lookup)|{one}|{several}", text)
    if match is None:
        raise ValueError(
            f"--strategy {text!r} was given; expected plain, lookup, exit:8, prefill:24 or "
            "token-exit:21,24, with any layers."
        )
    return match[1] or match[2] or match[3], [int(number) for number in re.findall(r"\d+", text)]


_TAKES = {
    "plain": (),
    "lookup": ("draft_tokens",),
    "exit": ("draft_tokens", "eta"),
    "prefill": ("keep",),
    "token-exit": ("threshold", "confidence"),
}


def _strategy(kind: str, layers: list[int], options: dict[str, Any]) -> "Strategy | None":
    """Return the strategy of the command line; refuse options of another one."""
    given = {name: value for name, value in options.items() if value is not None}

    def flag(name: str) -> str:
        return f"--{name.replace('_', '-')}"

    foreign = [name for name in given if name not in _TAKES[kind]]
    if foreign:
        raise ValueError(
            f"{flag(foreign[0])} was given with --strategy {kind}; expected "
            f"{' or '.join(map(flag, _TAKES[kind])) or 'no such option'} there."
        )
    from spade_lens.generation import ExitPrefill, LayerExit, Speculate, TokenExit
    from spade_lens.lenses.keep import Keep

    if kind == "prefill":
        keep = given.get("keep", "start+answer")
        match = re.fullmatch(r"start\+answer|last (\d{1,6})", keep)
        if match is None:
            raise ValueError(
                f"--keep {keep!r} was given; expected 'start+answer', or such as 'last 16'."
            )
        return ExitPrefill(layers[0], keep=Keep(last=int(match[1] or 1)))
    if kind == "token-exit":
        return TokenExit(layers, given.pop("threshold", 0.9), **given)
    if kind == "exit":
        return Speculate(LayerExit(layers[0]), adaptive=False, **{"draft_tokens": 5} | given)
    return Speculate(**given) if kind == "lookup" else None


def _sampling(
    temperature: float | None, top_k: int | None, top_p: float | None, seed: int | None
) -> "Sampling | None":
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if temperature == 0:
        raise ValueError(
            "--temperature 0 was given; expected a number above 0. For the likeliest token at "
            "every step, give no option of sampling."
        )
    from spade_lens.generation import Sampling

    return Sampling(**options) if options else None


def is_terminal() -> bool:
    """Whether somebody watches."""
    return sys.stdout.isatty()


class Stream:
    """Prints a text as its tokens come, as far as no later token can change it.

    Args:
        tokenizer: The tokenizer.
        stops: Strings that end the text. What may be the beginning of one is held back.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._tokens: list[int] = []
        self._shown = ""

    def __call__(self, prompt: int, token: int, word: str) -> None:
        """Take a token."""
        from spade_lens.generation.stops import cut, text_of

        self._tokens.append(token)
        text = cut(text_of(self._tokenizer, self._tokens).rstrip("\ufffd"), self._stops)
        begun = [n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        self._show(text[: len(text) - max(begun, default=0)])

    def end(self, text: str) -> None:
        """Print what is left of the text, and a line end."""
        self._show(text)
        typer.echo("")

    def _show(self, text: str) -> None:
        from spade_lens.checks import visible

        if len(text) > len(self._shown):
            typer.echo(visible(text[len(self._shown) :]), nl=False)
            sys.stdout.flush()
            self._shown = text


def _summary(written: "Generated") -> str:
    drafts = ""
    if int(written.rounds[:, 1].sum()):
        drafts = (
            f", acceptance {written.acceptance:.2f}, {written.tokens_per_round:.2f} tokens a round"
        )
    if written.exit_layer is not None:
        drafts += f", exit layer {float(written.exit_layer.double().mean()):.1f} on average"
    return f"[{len(written.token)} tokens, ended by {written.ended[0]}; {written.strategy}{drafts}]"
