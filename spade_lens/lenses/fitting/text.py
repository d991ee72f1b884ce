"""Calibration text: pieces of text of one length, each of a known document, for fitting lenses.

The default needs no data: the model itself writes the text. What a model says at temperature 1
is by definition what it expects text to be, so it covers the model's own residual stream. Text of
the domain that a lens will be read on is better, if there is some. This module does not know what
the text is used for.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch

from spade_lens.lazy import verb
from spade_lens.models.model import Model
from spade_lens.prompts.prompt import Prompt, StartToken, check_bos, start_token_id
from spade_lens.settings import Settings, progress_bar, scoped

_TEXTS_AT_ONCE = 80
"""Texts sampled side by side; beyond this the keys and values cost more memory than time.

Not derived from the memory limit: the text that a seed gives depends on it.
"""

_LONG_DOCUMENT = 16
"""No document gives more than this fraction (1/16) of the pieces while others still have some."""

TextSource = Any
"""A path or name, texts or prompts in a list, or a Hugging Face data set; see calibration_text."""


@dataclass(frozen=True)
class CalibrationText:
    """Pieces of text, and the document that each piece comes from.

    Args:
        pieces: The pieces, each with its start token.
        document: The number of each piece's document, by which data are split.
        about: Where the text came from, ready for JSON.

    Raises:
        ValueError: If there are no pieces, or not one document number for each.
    """

    pieces: tuple[Prompt, ...]
    document: tuple[int, ...]
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.pieces:
            raise ValueError("The calibration text is empty. Give at least one piece of text.")
        if len(self.pieces) != len(self.document):
            raise ValueError(
                f"{len(self.document)} document numbers were given for {len(self.pieces)} pieces; "
                "give one for each."
            )

    @property
    def sha256(self) -> str:
        """A hash of all token ids, answer positions and document numbers."""
        rows = [(d, p.answer, p.tokens) for d, p in zip(self.document, self.pieces, strict=True)]
        return sha256(repr(rows).encode()).hexdigest()


@scoped
def calibration_text(
    model: Model,
    source: TextSource = None,
    *,
    n_pieces: int = 160,
    n_tokens: int = 128,
    bos: StartToken = True,
    seed: int = 0,
    settings: Settings | None = None,
) -> CalibrationText:
    """Cut a text into pieces that fit a model, or let the model write it.

    Example:
        >>> text = calibration_text(model, ["a first document", "a second"], n_tokens=16)
        >>> text.document
        (0, 0, 1)
        >>> calibration_text(model, n_pieces=2, n_tokens=8).about["source"]
        'sampled from tiny-llama'

    Args:
        model: The model whose tokenizer cuts the text, or that writes it.
        source: A text file, a folder of them (``.txt`` and ``.md``, a document each, folders
            within it too), the name of a Hugging Face data set (``"name"`` or
            ``"name:configuration"``, its training split), a loaded data set (the column
            ``text``, or the only one with text), a list of texts, or a list of prompts, which
            are taken as they are. None: the model writes the text, at temperature 1.
        n_pieces: How many pieces to take at most.
        n_tokens: The length of a piece in tokens, the start token included.
        bos: The start token of every piece, see :func:`spade_lens.prompts.prompt.encode`.
        seed: The seed of what the model writes, or of the order of documents.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Returns:
        The pieces. Long documents give several, short ones one, of fewer tokens.

    Raises:
        ValueError: If there is no text, a name leads nowhere, or a size is out of range.
        TypeError: If a source or one of its texts is of a wrong kind.
        ImportError: If a data set is named and the package ``datasets`` is not installed.
    """
    if isinstance(source, CalibrationText):
        model.check_prompts(source.pieces)
        return source
    if n_pieces < 1 or not 2 <= n_tokens <= model.n_ctx:
        raise ValueError(
            f"n_pieces={n_pieces} pieces of n_tokens={n_tokens} were asked for; expected at least "
            f"one piece of 2 to {model.n_ctx} tokens ({model.name}'s context)."
        )
    if source is None:
        pieces = sample_text(model, n_pieces=n_pieces, n_tokens=n_tokens, bos=bos, seed=seed)
        return sampled(model, pieces, seed=seed)
    prompts = _prompts(source)
    if prompts:
        model.check_prompts(prompts)
        return _with_record(prompts, range(len(prompts)), "prompts", seed)
    name, documents = _documents(source, seed)
    pieces, document = _cut(model, name, documents, n_pieces, n_tokens, bos)
    return _with_record(pieces, document, name, seed)


def sampled(model: Model, pieces: Sequence[Prompt], *, seed: int) -> CalibrationText:
    """Return calibration text of pieces that :func:`sample_text` gave."""
    return _with_record(pieces, range(len(pieces)), f"sampled from {model.name}", seed)


def _with_record(
    pieces: Sequence[Prompt], document: Iterable[int], source: str, seed: int
) -> CalibrationText:
    about = {
        "source": source,
        "seed": seed,
        "pieces": len(pieces),
        "tokens": sum(len(piece) for piece in pieces),
    }
    return CalibrationText(tuple(pieces), tuple(document), about)


@scoped
@torch.no_grad()
def sample_text(
    model: Model,
    *,
    n_pieces: int,
    n_tokens: int,
    bos: StartToken = True,
    seed: int = 0,
    settings: Settings | None = None,
) -> list[Prompt]:
    """Sample text that the model writes after its start token, at temperature 1.

    Only its length ends a text: a model that closes one document goes on with another, as in the
    text that most models were trained on. One seed gives one text on the same machine.
    """
    start = _start_token(model, bos)
    draws = torch.Generator().manual_seed(int(seed))
    pieces: list[Prompt] = []
    with progress_bar(
        total=n_pieces * (n_tokens - 1), desc="sample text", unit="token", model=model
    ) as bar:
        for first in range(0, n_pieces, _TEXTS_AT_ONCE):
            texts = [[start] for _ in range(min(_TEXTS_AT_ONCE, n_pieces - first))]
            prompts = [Prompt(tokens=(start,)) for _ in texts]
            for i, tokens in verb("sample_together")(model, prompts, n_tokens - 1, draws):
                texts[i] += tokens
                bar.update(len(tokens))
            pieces += [Prompt(tokens=tuple(text)) for text in texts]
    return pieces


def _start_token(model: Model, bos: StartToken) -> int:
    check_bos(bos)
    if model.tokenizer is not None:
        return start_token_id(model.tokenizer, bos=bos)
    start = getattr(getattr(model.original, "config", None), "bos_token_id", None)
    if start is None:
        raise ValueError(
            f"{model.name} has no tokenizer and names no start token to write after. "
            "Give load() a tokenizer, or give the calibration text yourself."
        )
    return int(start)


# -- from what a user has to documents


def _prompts(source: Any) -> list[Prompt]:
    if isinstance(source, Sequence) and source and isinstance(source[0], Prompt):
        strangers = {type(p).__name__ for p in source if not isinstance(p, Prompt)}
        if strangers:
            raise TypeError(f"One list mixes prompts and {sorted(strangers)}; give one kind.")
        return list(source)
    return []


def _documents(source: Any, seed: int) -> tuple[str, Iterator[tuple[int, str]]]:
    """Return the source's name, and its documents with their numbers, in seeded order."""
    if isinstance(source, (str, PathLike)):
        path = Path(source).expanduser()
        if "\n" in str(source) or len(str(source)) > 1000:
            raise ValueError(
                "A long string was given; a string names a file, a folder or a data set. Put text "
                "itself in a list: [text]."
            )
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md"))
            return str(path), _in_order(files, seed, _read)
        if path.is_file():
            return str(path), _in_order([path], seed, _read)
        return str(source), _rows(_hub_data_set(str(source)), seed)
    if isinstance(source, Sequence) and not hasattr(source, "column_names"):
        return f"{len(source)} texts", _in_order(source, seed, _checked)
    if isinstance(source, Iterable):
        return str(getattr(source, "builder_name", None) or "a data set"), _rows(source, seed)
    raise TypeError(
        f"Calibration text of type {type(source).__name__} was given; expected a path, a data set "
        "or its name, a list of texts, a list of prompts, or None to let the model write it."
    )


def _in_order(items: Any, seed: int, text_of: Callable[[Any], Any]) -> Iterator[tuple[int, Any]]:
    draws = torch.Generator().manual_seed(int(seed))
    for i in torch.randperm(len(items), generator=draws).tolist():
        yield i, text_of(items[i])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}). Convert it first.") from error


def _checked(text: Any) -> str:
    if not isinstance(text, str):
        raise TypeError(f"A text is {text!r}, a {type(text).__name__}; expected a string.")
    return text


def _rows(data_set: Any, seed: int) -> Iterator[tuple[int, str]]:
    """Return rows of a data set, in seeded order if it knows its length."""
    rows: Iterator[tuple[int, Any]]
    if hasattr(data_set, "__len__") and hasattr(data_set, "__getitem__"):
        rows = _in_order(data_set, seed, lambda row: row)
    else:
        rows = enumerate(data_set)
    first = next(rows, None)
    if first is None:
        return
    column = _text_column(first[1])
    for i, row in chain([first], rows):
        yield i, _checked(row[column])


def _text_column(row: Any) -> str:
    if not isinstance(row, Mapping):
        raise TypeError(
            f"A row of the data set is a {type(row).__name__}; expected a mapping with a column "
            "'text'. Texts of your own go in a list of strings."
        )
    columns = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in columns:
        return "text"
    if len(columns) != 1:
        raise ValueError(
            f"Which column is the text? The data set has {list(row)}, of which {columns} hold "
            "text. Rename the one you mean to 'text' (data_set.rename_column)."
        )
    return cast(str, columns[0])


def _hub_data_set(name: str) -> Any:
    try:
        import datasets  # here, since only this needs it
    except ImportError as error:
        raise ImportError(
            f"{name!r} is no file or folder here, and to look for a data set of that name the "
            "package 'datasets' is needed: pip install datasets"
        ) from error
    path, _, configuration = name.partition(":")
    try:
        return datasets.load_dataset(path, configuration or None, split="train")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"There is no file, folder or Hugging Face data set {name!r}: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error


# -- from documents to pieces


def _cut(
    model: Model,
    name: str,
    documents: Iterator[tuple[int, str]],
    n_pieces: int,
    n_tokens: int,
    bos: StartToken,
) -> tuple[list[Prompt], list[int]]:
    if model.tokenizer is None:
        raise ValueError(f"{model.name} came without a tokenizer. Give load() one, or prompts.")
    start = [] if bos is False else [start_token_id(model.tokenizer, bos=bos)]
    most = max(1, n_pieces // _LONG_DOCUMENT)
    taken: list[tuple[int, int, Prompt]] = []
    spare: list[tuple[int, int, Prompt]] = []
    for document, text in documents:
        ids = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        step = n_tokens - len(start)
        cuts = [[*start, *ids[i : i + step]] for i in range(0, len(ids), step)]
        cuts = [cut for cut in cuts if len(cut) > 1]  # one is there to be read, one to start
        # Spread over the document, where it has more than can be used.
        cuts = cuts[:: max(1, len(cuts) // n_pieces)][:n_pieces]
        numbered = [(document, i, Prompt(tokens=tuple(cut))) for i, cut in enumerate(cuts)]
        taken += numbered[:most]
        spare += numbered[most:][: max(0, n_pieces - len(taken) - len(spare))]
        if len(taken) >= n_pieces:
            break
    chosen = sorted((taken + spare)[:n_pieces], key=lambda piece: piece[:2])
    if not chosen:
        raise ValueError(f"There is no text in {name}. Expected at least a few words.")
    return [piece for *_, piece in chosen], [document for document, *_ in chosen]
