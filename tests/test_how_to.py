"""The lines of README, CONTRIBUTING and the how-to pages run, on a small model."""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import transformers
from tiny import tiny, tiny_tokenizer

from spade_lens import Model, load
from spade_lens.models.catalogue import fetch_model_files

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "how-to"
PAGES = sorted(page for page in FOLDER.glob("*.md") if page.name != "index.md")
FRONT = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
LOAD = re.compile(r"^model = sl\.load\(\) *(#.*)?\n", flags=re.MULTILINE)


def lines_of(page: Path) -> str:
    """All Python of a page, without the line that loads the model anew."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return LOAD.sub("", "\n".join(blocks))


@pytest.fixture(scope="module")
def small() -> Model:
    """A Llama of six small blocks with the vocabulary, tokenizer and chats of the default model."""
    [file] = fetch_model_files("smollm2-135m-instruct")
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    return load(model, tokenizer=tokenizer, name="small")


@pytest.fixture(scope="module")
def own_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, pairs and a text, as the pages have them."""
    folder = tmp_path_factory.mktemp("reader")
    tiny("llama").save_pretrained(folder / "my-folder")
    tiny_tokenizer().save_pretrained(folder / "my-folder")
    (folder / "pairs.csv").write_text("input,output\nwalk,walked\nsing,sang\ngo,went\n")
    sentences = [
        f"Town {n} has {n % 7 + 2} mills and a bridge over the river. " for n in range(200)
    ]
    (folder / "text.txt").write_text("\n\n".join(s * 3 for s in sentences))
    return folder


@pytest.mark.filterwarnings("ignore:On task", "ignore:vowels")  # so few prompts are at chance
@pytest.mark.parametrize("page", [*PAGES, *FRONT], ids=lambda page: page.stem)
def test_lines_run(
    page: Path, small: Model, own_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(own_files)
    lines = lines_of(page)
    assert lines.count("\n") > 5
    exec(compile(lines, page.name, "exec"), {"model": small, "__name__": "__page__"})
    plt.close("all")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_has_its_pitfalls_and_is_found(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"^- \*\*", text, flags=re.MULTILINE)) + text.count("\n| `") >= 4
    assert f"\n{page.stem}\n" in (FOLDER / "index.md").read_text(encoding="utf-8")
