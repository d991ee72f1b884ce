"""The command line: arguments, lists, and one clear message for what goes wrong."""

import json
import subprocess
import sys
from importlib.metadata import version
from math import exp
from pathlib import Path

import pandas as pd
import pytest
from tiny import tiny, tiny_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from spade_lens import Model
from spade_lens.cli.commands import app
from spade_lens.cli.options import parse_layers, parse_positions


def run(*args: str) -> Result:
    return CliRunner().invoke(app, list(args))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as a local folder."""
    path = tmp_path_factory.mktemp("tiny")
    tiny("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A CSV of pairs."""
    path = tmp_path / "letters.csv"
    path.write_text("input,output\n" + "".join(f"{c},{c.upper()}\n" for c in "abcdef"))
    return path


def test_layers() -> None:
    assert parse_layers("0,6,12-15, 2 - 3") == [0, 6, 12, 13, 14, 15, 2, 3]


@pytest.mark.parametrize("text", ["", "a", "5-2", "1,,2", "-3", "1-2-3", "1.5"])
def test_layers_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="neither a layer nor a rising range"):
        parse_layers(text)


def test_positions() -> None:
    assert parse_positions("last") == "last" and parse_positions("all") == "all"
    assert parse_positions(" 3, -1") == [3, -1]
    for wrong in ("", "first", "1.5", "1,,2", "1-2"):
        with pytest.raises(ValueError, match="expected last, all, or numbers such as 3,-1"):
            parse_positions(wrong)


def test_read_shows_layers_by_lens(folder: Path, tmp_path: Path) -> None:
    csv = tmp_path / "read.csv"
    args = ["read", "ab->AB", "--model", str(folder), "--layers", "0,2-4"]
    result = run(*args, "--csv", str(csv))
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "4 layers; 7 tokens" in lines[0]  # the start token and six characters
    assert lines[2] == "After 'B' (position 6)"
    assert lines[4].split() == (
        [
            "layer",
            "logit",
            "lens:",
            "entropy,",
            "top",
            "tokens",
            "SPADE:",
            "entropy,",
            "top",
            "tokens",
        ]
    )
    assert [line.split()[0] for line in lines[5:9]] == ["0", "2", "3", "4"]
    assert max(map(len, lines[:9])) <= 100
    frame = pd.read_csv(csv, keep_default_na=False)
    assert frame["lens"].unique().tolist() == ["logit lens", "SPADE"]
    assert frame["layer"].unique().tolist() == [0, 2, 3, 4]
    # The last layer is the model, whatever the lens: entropy, then token and probability.
    logit, spade = (
        frame[(frame["lens"] == n) & (frame["layer"] == 4)] for n in frame["lens"].unique()
    )
    assert spade["entropy"].item() == pytest.approx(logit["entropy"].item(), abs=1e-4)
    for row in (logit, spade):
        assert f"{row['entropy'].item():5.2f}" in lines[8]
        shown = f"{exp(row['top_1_logprob'].item()):.2f}"[1:]
        assert f"{row['top_1'].item()!r:<8} {shown}" in lines[8]


def test_read_several_positions_lenses_and_tokens(folder: Path) -> None:
    args = ["read", "ab->AB", "--model", str(folder), "--layers", "3", "--positions", "1,-1"]
    result = run(*args, "--lens", "spade", "--lens", "logit", "--top", "5")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line for line in lines if line.startswith("After")] == [
        "After 'a' (position 1)",
        "After 'B' (position 6)",
    ]
    # Too wide for two side by side: one below the other, as they were named.
    assert [line.split(":")[0] for line in lines if line.startswith("layer")] == [
        *("layer  SPADE", "layer  logit lens", "layer  SPADE", "layer  logit lens")
    ]
    assert max(map(len, lines)) <= 100


def test_read_writes_a_page(folder: Path, tmp_path: Path) -> None:
    page, csv = tmp_path / "new" / "page.html", tmp_path / "read.csv"
    args = ["read", "ab->AB", "--model", str(folder), "--layers", "0,4", "--lens", "logit"]
    result = run(*args, "--html", str(page), "--csv", str(csv))
    assert result.exit_code == 0, result.output
    assert result.stdout.split()[-2:] == [str(page), str(csv)] and "After" not in result.stdout
    assert len(pd.read_csv(csv)) == 2 * 7  # all positions, when none are named
    data = page.read_text(encoding="utf-8").partition('id="data">')[2].partition("</script>")[0]
    assert json.loads(data)["labels"] == ["<s>", *"ab->AB"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--html", "page.txt"], "expected a file that ends in .html"),
        (["--lens", "nowhere"], "no lens 'nowhere'. Expected logit, spade, l-spade, tuned"),
        (["--layers", "9"], "layers 0 (the embedding) to 4"),
        (["--layers", "x"], "neither a layer nor a rising range"),
        (["--positions", "first"], "expected last, all, or numbers"),
        (["--positions", "50"], "50"),
        (["--top", "0"], "--top 0 was given; expected a whole number from 1"),
    ],
)
def test_errors_of_read(args: list[str], message: str, folder: Path) -> None:
    result = run("read", "ab", "--model", str(folder), *args)
    assert result.exit_code == 1
    assert message in result.stderr and "Traceback" not in result.output


@pytest.mark.parametrize(
    "args",
    [["--lens", "nowhere"], ["--layers", "20-31"], ["--top", "0"], ["--html", "page.txt"]],
)
def test_read_refuses_before_it_loads(args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("spade_lens.cli.options.load_model", load)
    result = run("read", "ab", *args)
    assert result.exit_code == 1 and args[1].split("-")[-1] in result.stderr
    assert "loaded" not in result.stderr


def test_version() -> None:
    assert run("--version").stdout == f"spade-lens {version('spade-lens')}\n"


def test_demo_on_a_folder_with_own_pairs(folder: Path, pairs: Path, tmp_path: Path) -> None:
    args = ["demo", "--model", str(folder), "--pairs", str(pairs), "--shots", "2"]
    args += ["--samples", "3", "--layers", "1-2", "--seed", "4", "--out", str(tmp_path / "out")]
    result = run(*args)
    assert result.exit_code == 0, result.output
    assert "letters: 3 prompts" in result.output
    assert (tmp_path / "out" / "accuracy.pdf").exists()
    assert "not again: letters" in run(*args).output
    assert "not again" not in run(*args, "--fresh").output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--task", "present-pats"], "Did you mean 'present-past'"),
        (["--pairs", "no-such.csv"], "no-such.csv"),
        (["--layers", "3-1"], "'3-1' is neither a layer nor a rising range"),
        (["--layers", "0-31"], "0 (the embedding) to 30 (the model's output)"),
        (["--samples", "0"], "n=0 was given; expected a whole number, 1 or more"),
        (["--seed", "-1"], "seed=-1 was given; expected 0 or more"),
        (["--out", __file__ + "/out"], "cannot be written"),
        (["--model", "smollm2-135m-instrukt"], "smollm2-135m-instruct"),
        (["--model", "./nowhere.gguf"], "There is no file or folder './nowhere.gguf'"),
    ],
)
def test_errors_are_one_message(
    args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("demo", *args)
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert message in result.stderr
    assert result.stderr.startswith("Error: ")


def test_a_csv_without_the_columns(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("word,past\ngo,went\n")
    result = run("demo", "--pairs", str(path), "--out", str(tmp_path / "out"))
    assert result.exit_code == 1
    for word in ("'input'", "'output'", "'word'", "'past'"):  # what is expected, what is there
        assert word in result.stderr


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = run("demo", "--debug", "--samples", "0", "--out", str(tmp_path))
    assert isinstance(result.exception, ValueError)


def test_fit_writes_a_lens_and_prints_its_table(folder: Path, tmp_path: Path) -> None:
    args = ["--model", str(folder), "--pieces", "40", "--piece-tokens", "32", "--layers", "1-2"]
    result = run("fit", *args, "--per-piece", "30", "--rank", "3", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "2 layers from 1 to 2, rank 3" in result.output
    assert "agrees with SPADE: L-SPADE" in result.output
    assert (tmp_path / "lens.safetensors").exists()
    result = run("fit", *args, "--kind", "tuned", "--rank", "3", "--out", str(tmp_path))
    assert "--rank is for --kind l-spade" in result.stderr


@pytest.fixture
def loaded(smollm2: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default model, which other tests have loaded; test_generate.py loads it by a command."""

    def load(name: str, device: str, dtype: str) -> Model:
        assert (name, device, dtype) == ("smollm2-135m-instruct", "cpu", "float32")
        return smollm2

    monkeypatch.setattr("spade_lens.cli.options.load_model", load)


@pytest.mark.download
@pytest.mark.usefixtures("loaded")
def test_exit_prints_its_table_and_warnings(tmp_path: Path) -> None:
    args = ["--task", "antonym", "--lens", "logit", "--keep", "start+answer", "--layers", "24"]
    args += ["--calibration", "6", "--samples", "4", "--shots", "2", "--rounds", "0"]
    result = run("exit", *args, "--loss", "0", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "antonym: 4 test prompts" in result.stdout
    assert "the paper's" in result.stdout
    assert (tmp_path / "front.pdf").exists()
    assert "Warning: " in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--task", "antonyms"], "There is no task 'antonyms'"),
        (["--task", "antonym", "--guarantee", "0.01"], "25 calibration prompts here"),
        (["--task", "antonym", "--loss", "1.5"], "from 0 to 1"),
        (["--pairs", "no-such.csv"], "no-such.csv"),
        (["--task", "antonym", "--model", "tiny", "--lens", "nowhere"], "no lens 'nowhere'"),
        (["--task", "antonym", "--model", "tiny", "--layers", "9"], "expected layers from 0 to 3"),
        (["--task", "antonym", "--keep", "queries"], "There is no keep set ['queries']"),
        (["--task", "antonym", "--pairs", "x.csv"], "--task and --pairs were both given"),
    ],
)
def test_errors_of_exit(
    args: list[str], message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = [str(folder) if a == "tiny" else a for a in args]
    result = run("exit", *own)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Error: " in result.stderr and "Traceback" not in result.output


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokenizer has labels with a space before them, as single tokens."""
    path = tmp_path_factory.mktemp("labelled")
    tiny("llama").save_pretrained(path)
    pieces = ["<pad>", "<s>", "</s>", " A", " B", " ->", "\n", " ?", *"abcdefghij", "thing"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[^\s]+|\n"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(path)
    return path


def test_icl_on_a_folder_with_own_classes(labelled: Path, tmp_path: Path) -> None:
    classes = tmp_path / "letters.csv"
    classes.write_text(
        "input,class\n" + "".join(f"{c},{i % 2}\n" for i, c in enumerate("abcdefghij"))
    )
    args = ["icl", "--model", str(labelled), "--classes", str(classes), "--shots", "2"]
    args += ["--samples", "6", "--few", "1", "--layers", "1-2", "--seed", "4"]
    args += ["--experiment", "shots", "--experiment", "contributions"]
    args += ["--out", str(tmp_path / "out")]
    result = run(*args)
    assert result.exit_code == 0, result.output
    assert "letters: 6 prompts of 2 demonstrations, seed 4" in result.stdout
    # Six prompts of random weights: nobody can tell them from chance.
    assert "Warning: " in result.stderr and "nothing to explain" in result.stderr
    for name in ("shots.csv", "shots.pdf", "contributions.png", "contributions.json"):
        assert (tmp_path / "out" / name).exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--task", "antonyms"], "Did you mean 'antonym'"),
        (["--task", "animal/contry"], "Did you mean 'country'"),
        (["--experiment", "patchin"], "There is no experiment 'patchin'"),
        (["--layers", "0-31"], "from 0 (the embedding) to 30 (the model's output)"),
        (["--layers", "3-1"], "'3-1' is neither a layer nor a rising range"),
        (["--label", "A", "--label", "A"], "all distinct"),
        (["--shots", "0"], "shots=0"),
        (["--shots", "200"], "Ask for fewer shots or give more inputs"),
        (["--samples", "4", "--experiment", "all"], "too few for the geometry"),
        (["--classes", "no-such.csv"], "no-such.csv"),
        (["--classes", "x.csv", "--pairs", "y.csv"], "Give either"),
        (["--out", __file__ + "/out"], "cannot be written"),
        (["--model", "labelled", "--label", "A", "--label", "aa b"], "not a single token"),
        (["--model", "labelled", "--layers", "9"], "[9] were asked for"),
    ],
)
def test_errors_of_icl(
    args: list[str],
    message: str,
    labelled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("icl", *[str(labelled) if a == "labelled" else a for a in args])
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Error: " in result.stderr and "Traceback" not in result.output


@pytest.mark.download
@pytest.mark.usefixtures("loaded")
def test_icl_on_the_real_model(tmp_path: Path) -> None:
    args = ["--experiment", "patching", "--samples", "12", "--shots", "8", "--layers", "12,18"]
    result = run("icl", *args, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "animal/country: 12 prompts of 8 demonstrations" in result.stdout
    chosen = pd.read_csv(tmp_path / "patching-chosen.csv")
    measure = chosen[chosen["measure"] == "logit_diff"].set_index("condition")["mean"]
    # What the library is for: the rule comes with the vectors, and not with its controls.
    assert measure["labels to the top"] > measure["labels to the top, random"] + 1
    assert measure["labels to the top"] > measure["labels to the top, opposite"] + 1


def test_lists() -> None:
    models = run("models").output
    assert "smollm2-135m-instruct" in models
    assert "Apache-2.0" in models
    tasks = run("tasks").output
    assert "present-past" in tasks
    assert "go -> went" in tasks
    assert "arc-easy-words" in tasks
    assert "string-length" in tasks and "animal" in tasks


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "spade_lens", "--version"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("spade-lens ")
