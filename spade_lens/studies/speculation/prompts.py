"""Prompts by kind: the library's own, a file of yours, or what is at hand."""

import json
from collections.abc import Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, TypeAlias

from spade_lens.checks import plain_name
from spade_lens.prompts.inputs import PromptsLike
from spade_lens.prompts.prompt import Prompt

GivenPrompts: TypeAlias = PromptsLike | Mapping[str, PromptsLike] | Path | None
"""Prompts, prompts by kind, a file of prompts, or None for the library's own."""

_KINDS = (str, Prompt, Mapping, Sequence)
_OWN = Path(__file__).parent / "prompts.jsonl"
_EXPECTED = (
    'expected a text, or an object with "prompt" (a text, or the messages of a chat) and perhaps '
    '"kind" (a text)'
)


def prompts_by_kind(given: GivenPrompts) -> dict[str, Any]:
    """Return prompts by their kind, which is "" where none is named.

    Example:
        >>> list(prompts_by_kind(None))
        ['chat', 'copying', 'documents', 'free text']
        >>> prompts_by_kind(["ab", "abc"])
        {'': ['ab', 'abc']}

    Args:
        given: Prompts, prompts by kind, or a file: one prompt a line, or JSON lines (``.jsonl``)
            with ``prompt`` and perhaps ``kind``. None for the library's own.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If something else is given.
        ValueError: If the file is damaged, or there are no prompts.
    """
    if given is None or isinstance(given, Path):
        return _from_file(_OWN if given is None else given.expanduser())
    if not isinstance(given, Mapping) or "role" in given:
        by_kind: dict[str, Any] = {"": given}
    else:
        by_kind = {plain_name(kind, "a kind of prompts"): some for kind, some in given.items()}
    wrong = [x for x in by_kind.values() if not isinstance(x, _KINDS) or isinstance(x, bytearray)]
    if wrong:
        raise TypeError(
            f"prompts={wrong[0]!r:.60} was given; expected a text, the messages of a chat, a "
            "prompt, a list of these, or such by kind."
        )
    empty = [kind for kind, some in by_kind.items() if isinstance(some, Sized) and not len(some)]
    if empty or not by_kind:
        raise ValueError(f"prompts={given!r} was given; expected at least one prompt of each kind.")
    _check_kinds(by_kind)
    return by_kind


def _check_kinds(kinds: Iterable[str]) -> None:
    if "all" in kinds:
        raise ValueError(
            "A kind of prompts is called 'all', which stands for every kind in the tables; give it "
            "another name."
        )


def _from_file(path: Path) -> dict[str, list[Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"There is no file {str(path)!r}; expected a file of prompts, one a line, or .jsonl."
        ) from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise ValueError(
            f"{str(path)!r} cannot be read as text ({error}); expected a file of prompts, one a "
            "line, or .jsonl."
        ) from error
    found: dict[str, list[Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        kind, prompt = ("", line)
        if path.suffix == ".jsonl":
            kind, prompt = _record(line, f"Line {number} of {str(path)!r}")
        found.setdefault(kind, []).append(prompt)
    if not found:
        raise ValueError(f"{str(path)!r} has no prompts; expected at least one line.")
    _check_kinds(found)
    return found


def _record(line: str, name: str) -> tuple[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{name} is no JSON ({error}); {_EXPECTED}.") from error
    if isinstance(record, str) and record:
        return "", record
    kind = record.get("kind", "") if isinstance(record, dict) else None
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(kind, str) or not isinstance(prompt, str | list) or not prompt:
        raise ValueError(f"{name} is {record!r:.60}; {_EXPECTED}.")
    return plain_name(kind, "a kind of prompts"), prompt
