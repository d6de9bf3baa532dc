"""What the documents say is what the program does."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer

from infold.cli.main import app

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "cli.md").read_text()
README = (ROOT / "README.md").read_text()
COMMAND = typer.main.get_command(app)


def test_every_command_and_option_is_documented() -> None:
    missing = []
    for name, command in COMMAND.commands.items():
        heading = f"## infold {name}"
        if heading not in PAGE:
            missing.append(heading)
            continue
        section = PAGE.split(heading, 1)[1].split("\n## ", 1)[0]
        for parameter in command.params:
            words = parameter.opts if parameter.param_type_name == "option" else [parameter.name]
            names = [word for word in words if word.startswith("--")]
            missing += [f"{name} {word}" for word in names if f"`{word}" not in section]

    assert missing == []


def test_no_option_is_documented_that_does_not_exist() -> None:
    for name, command in COMMAND.commands.items():
        section = PAGE.split(f"## infold {name}", 1)[1].split("\n## ", 1)[0]
        known = {opt for parameter in command.params for opt in parameter.opts} | {"--help"}

        assert set(re.findall(r"`(--[a-z0-9-]+)", section)) <= known


def test_exit_codes_are_documented() -> None:
    for code in ("0", "1", "2", "3", "70", "130"):
        assert re.search(rf"^\| {code} \|", PAGE, re.MULTILINE)


def test_the_names_of_errors_are_documented() -> None:
    import infold.deploy.local
    import infold.deploy.server  # noqa: F401  (they define some)
    from infold.errors import InfoldError

    def below(kind: type[InfoldError]) -> list[type[InfoldError]]:
        return [kind, *(one for child in kind.__subclasses__() for one in below(child))]

    kinds = [k for k in below(InfoldError) if k is not InfoldError and ".cli." not in k.__module__]
    lacking = [k.__name__ for k in kinds if f"| `{k.__name__}` | {k.exit_code} |" not in PAGE]
    assert len(kinds) >= 6 and lacking == []


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def readme_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone after `make demo`, and the home of who made it: with a tiny base, and an adapter."""
    import torch
    from peft import IA3Config, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("readme")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / ".cache" / "infold" / "SmolLM2-135M-Instruct")
    ia3 = IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        init_ia3_weights=False,
    )
    get_peft_model(model, ia3).save_pretrained(folder / "examples" / "adapters" / "ia3-reviews")
    return folder


def at_home(folder: Path) -> dict[str, str]:
    """The environment of a reader whose home is `folder`, and who activated the environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "HOME": str(folder), "PATH": path}


@pytest.mark.filterwarnings("ignore")
def test_readme_commands_run(readme_folder: Path) -> None:
    """As they are typed, but for the two that make the environment and the base."""
    lines = [
        line.removeprefix("$ ")
        for block in readme_blocks("console")
        for line in block.splitlines()
        if line.startswith("$ ")
    ]

    assert [line.split("#")[0].strip() for line in lines[:2]] == [
        "make demo", ". .venv/bin/activate",
    ]  # fmt: skip
    assert sum(line.startswith("infold ") for line in lines) >= 2
    ran = subprocess.run(
        ["bash", "-ec", "\n".join(lines[2:])],
        cwd=readme_folder, env=at_home(readme_folder), capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, f"{lines}\n{ran.stdout}{ran.stderr}"


@pytest.mark.filterwarnings("ignore")
def test_readme_python_runs(readme_folder: Path) -> None:
    blocks = readme_blocks("python")

    assert blocks
    for block in blocks:
        ran = subprocess.run(
            [sys.executable, "-c", block],
            cwd=readme_folder, env=at_home(readme_folder), capture_output=True, text=True,
        )  # fmt: skip
        assert ran.returncode == 0, f"{block}\n{ran.stderr}"


def test_the_readme_names_what_the_demo_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smollm2 = runpy.run_path(str(ROOT / "examples" / "smollm2.py"))
    for name in ("INFOLD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    base = (smollm2["default_cache"]() / smollm2["NAME"]).relative_to(tmp_path)

    assert f"base=~/{base}\n" in README and f'Path.home() / "{base}"' in README
    assert smollm2["UPSTREAM"] in README
    for place in set(re.findall(r"examples/adapters/[\w-]+", README)):
        config = json.loads((ROOT / place / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == smollm2["UPSTREAM"]


def test_links_between_documents_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]
    broken = [
        f"{page.name}: {target}#{anchor}"
        for page in pages
        for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", page.read_text())
        if "://" not in target and not leads_somewhere(page, target, anchor)
    ]

    assert broken == []


def leads_somewhere(page: Path, target: str, anchor: str) -> bool:
    """Whether a file is there, and has the heading: its words in lower case with dashes between."""
    place = page.parent / target if target else page
    if not place.exists():
        return False
    headings = re.findall(r"^#+ (.*)$", place.read_text(), re.MULTILINE) if anchor else []
    slugs = [re.sub(r"[^\w\- ]", "", head).lower().replace(" ", "-") for head in headings]
    return not anchor or anchor in slugs


def test_the_readme_tree_names_files_that_exist() -> None:
    tree = next(block for block in readme_blocks("text") if "src/infold/" in block)
    stack: list[str] = []
    missing = []
    for line in tree.splitlines():
        match = re.match(r"^( *)([\w./-]+)", line)
        if not match:
            continue
        depth = len(match[1]) // 2
        stack[depth:] = [match[2]]
        path = ROOT.joinpath(*stack)
        if not path.exists():
            missing.append(str(path.relative_to(ROOT)))

    assert missing == []


def test_help_of_each_verb_is_plain_words() -> None:
    for name, command in COMMAND.commands.items():
        text = command.get_help(click.Context(command, info_name=f"infold {name}"))

        assert "Usage: infold" in text and "TODO" not in text


def test_the_notebook_was_run_from_its_beginning_to_its_end() -> None:
    path = ROOT / "examples" / "ia3_merge_and_deploy.ipynb"
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]

    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells[1:] for output in cell["outputs"]]
    assert len(outputs) >= len(cells) - 1
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert str(Path.home()) not in path.read_text() and str(ROOT) not in path.read_text()
