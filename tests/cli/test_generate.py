"""The command that writes text: what the library writes, streamed, compared, refused."""

from pathlib import Path

import pytest
from tiny import tiny, tiny_tokenizer
from typer.testing import CliRunner, Result

import spade_lens as sl
from spade_lens.cli.commands import app
from spade_lens.cli.generation import Stream, parse_strategy
from spade_lens.generation import ExitPrefill, LayerExit, Sampling, Speculate, TokenExit


def run(*args: str) -> Result:
    return CliRunner().invoke(app, ["generate", *args])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as a local folder."""
    path = tmp_path_factory.mktemp("tiny")
    tiny("llama").save_pretrained(path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]?x{% endfor %}"
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> sl.Model:
    return sl.load(str(folder))


TEXT = "abcdabcdabcd"


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ([], {}),
        (["--strategy", "lookup", "--draft-tokens", "3"], {"strategy": Speculate(draft_tokens=3)}),
        (
            ["--strategy", "exit:2", "--eta", "0.02"],
            {"strategy": Speculate(LayerExit(2), 5, 0.02, adaptive=False)},
        ),
        (["--strategy", "prefill:2"], {"strategy": ExitPrefill(2)}),
        (
            ["--strategy", "prefill:2", "--keep", "last 3"],
            {"strategy": ExitPrefill(2, sl.Keep(last=3))},
        ),
        (["--strategy", "token-exit:1,2"], {"strategy": TokenExit([1, 2])}),
        (
            ["--strategy", "token-exit:1,3", "--threshold", ".7", "--confidence", "saturation"],
            {"strategy": TokenExit([1, 3], 0.7, "saturation")},
        ),
        (["--seed", "4"], {"sampling": Sampling(seed=4)}),
        (
            ["--temperature", "1.5", "--top-k", "9", "--top-p", ".8"],
            {"sampling": Sampling(1.5, 9, 0.8)},
        ),
        (["--stop", "q", "--stop", "7"], {"stop": ["q", "7"]}),
    ],
)
def test_it_writes_what_the_library_writes(
    args: list[str], options: dict[str, object], folder: Path, model: sl.Model
) -> None:
    expected = sl.generate(TEXT, 12, model=model, **options)  # type: ignore[arg-type]
    result = run(TEXT, "--max-new-tokens", "12", "--model", str(folder), *args)
    assert result.exit_code == 0, result.output
    assert result.stdout == expected.texts[0] + "\n"
    assert f"[{len(expected.token)} tokens, ended by {expected.ended[0]}; " in result.stderr
    assert expected.strategy in result.stderr


def test_a_chat_is_the_users_message(folder: Path, model: sl.Model) -> None:
    expected = sl.generate([{"role": "user", "content": TEXT}], 6, model=model)
    assert expected.prompts == (f"[{TEXT}]?x",)
    args = (TEXT, "--max-new-tokens", "6", "--model", str(folder))
    assert run(*args, "--chat").stdout == expected.texts[0] + "\n"
    assert expected.texts != sl.generate(TEXT, 6, model=model).texts


@pytest.mark.parametrize(("strategy", "same"), [("lookup", True), ("prefill:1", False)])
def test_a_comparison_is_printed(strategy: str, same: bool, folder: Path) -> None:
    args = (TEXT, "--max-new-tokens", "16", "--model", str(folder))
    result = run(*args, "--strategy", strategy, "--compare")
    assert result.exit_code == 0, result.output
    rows = [line.strip() for line in result.stdout.splitlines()]
    assert ("tokens            identical" in rows) == same
    assert same or any("differ first at new token" in row for row in rows)
    assert any(row.startswith("tokens per round  ") for row in rows)
    (clock,) = (row for row in rows if row.startswith("CPU time"))
    assert clock.split()[-1] in ("faster", "slower", "undecided") and "times as fast" in clock


def test_at_a_terminal_it_streams(
    folder: Path, monkeypatch: pytest.MonkeyPatch, model: sl.Model
) -> None:
    shown: list[str] = []
    show = Stream._show

    def recorded(stream: Stream, text: str) -> None:
        shown.append(text)
        show(stream, text)

    monkeypatch.setattr("spade_lens.cli.generation.is_terminal", lambda: True)
    monkeypatch.setattr(Stream, "_show", recorded)
    result = run(TEXT, "--max-new-tokens", "6", "--model", str(folder))
    text = sl.generate(TEXT, 6, model=model).texts[0]
    assert result.stdout == text + "\n"
    assert shown == [text[: n + 1] for n in range(6)] + [text]


def test_a_stream_holds_back_what_may_change(capsys: pytest.CaptureFixture[str]) -> None:
    class Pieces:
        """Two tokens that are one character, and plain ones."""

        words = ("a", "\ufffd", "\u00e9", "E", "N", "D", "\x1b")

        def decode(self, tokens: list[int], **_: object) -> str:
            return "".join(self.words[t] for t in tokens).replace("\ufffd\u00e9", "\u00e9")

        def convert_ids_to_tokens(self, token: int) -> str:
            return self.words[token]

    stream = Stream(Pieces(), ["END"])
    seen = []
    for token in (0, 1, 2, 3, 4, 0, 6, 3, 4, 5):
        stream(0, token, "")
        seen.append(capsys.readouterr().out)
    assert seen == ["a", "", "\u00e9", "", "", "ENa", "\\x1b", "", "", ""]
    stream.end("a\u00e9ENa\x1b")
    assert capsys.readouterr().out == "\n"


def test_strategies_by_name() -> None:
    assert parse_strategy("plain") == ("plain", [])
    assert parse_strategy("prefill:24") == ("prefill", [24])
    assert parse_strategy("token-exit:7") == ("token-exit", [7])
    for wrong in ("", "exit", "exit:", "exit:-1", "exit:1.5", "lookup:3", "Plain", "plain\n"):
        with pytest.raises(ValueError, match="expected plain, lookup, exit:8, prefill:24 or"):
            parse_strategy(wrong)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--strategy", "exits:8"], "expected plain, lookup, exit:8, prefill:24 or token-exit:21"),
        (["--strategy", "exit:8,9"], "expected plain, lookup"),
        (["--strategy", "token-exit:8,31"], "from 0 (the embedding) to 30"),
        (["--strategy", "token-exit:9,8"], "expected candidate layers from 1, ascending"),
        (["--strategy", "token-exit:8", "--threshold", "nan"], "--threshold nan was given"),
        (["--strategy", "token-exit:8", "--confidence", "sure"], "confidence='sure' was given"),
        (["--strategy", "exit:8", "--threshold", ".5"], "--threshold was given with --strategy ex"),
        (["--strategy", "token-exit:8", "--keep", "last 8"], "expected --threshold or --confidenc"),
        (["--strategy", "exit:31"], "from 0 (the embedding) to 30"),
        (["--strategy", "exit:0"], "layer=0 was given"),
        (["--keep", "last 8"], "--keep was given with --strategy plain"),
        (["--strategy", "lookup", "--eta", ".5"], "--eta was given with --strategy lookup"),
        (["--strategy", "prefill:8", "--draft-tokens", "3"], "expected --keep there"),
        (["--strategy", "prefill:8", "--keep", "labels"], "--keep 'labels' was given"),
        (["--strategy", "exit:8", "--eta", "2"], "eta=2.0 was given"),
        (["--strategy", "lookup", "--draft-tokens", "0"], "draft_tokens=0 was given"),
        (["--compare"], "give --strategy"),
        (["--compare", "--strategy", "lookup", "--seed", "1"], "no --temperature"),
        (["--temperature", "0"], "give no option of sampling"),
        (["--temperature", "nan"], "--temperature nan was given"),
        (["--top-p", "1.5"], "top_p=1.5"),
        (["--top-k", "0"], "top_k=0"),
        (["--seed", "-1"], "seed=-1"),
        (["--max-new-tokens", "0"], "--max-new-tokens=0 was given"),
        (["--stop", ""], "--stop '' was given"),
    ],
)
def test_it_refuses_before_it_loads(
    args: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("spade_lens.cli.options.load_model", load)
    result = run("ab", *args)
    assert result.exit_code == 1
    assert message in result.stderr and result.stderr.startswith("Error: ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--strategy", "exit:4"], "expected one below 4"),
        (["--strategy", "prefill:9"], "expected 1 to 4"),
        (["--max-new-tokens", "500"], "do not fit the context of 128"),
    ],
)
def test_errors_are_one_message(args: list[str], message: str, folder: Path) -> None:
    result = run("ab", "--model", str(folder), *args)
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert message in result.stderr and result.stderr.startswith("Error: ")


@pytest.mark.download
def test_the_real_model() -> None:
    result = run("The capital of France is", "--max-new-tokens", "3", "--strategy", "lookup")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(" Paris")
