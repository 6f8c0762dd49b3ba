"""The pages say what is true of the repository: links, paths, flags and commands exist, and the README's Python runs."""

import ast
import contextlib
import functools
import importlib
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import unicodedata
from collections.abc import Iterator

import pytest
from absl import flags

from experiments import doctor, search
from experiments.common import command_line, inputs, options, search_cost, topologies
from experiments.common.options import EXPERIMENTS
from indexcache_jax import memory, params
from indexcache_jax.config import Config
from indexcache_jax.schedule import Schedule
from indexcache_jax.serving.generation import CACHE_MULTIPLE
from indexcache_jax.sharding import SERVING
from pallas_kernels import device

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "experiments" / "assets" / "demo" / "README.md",
]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))

PACKAGES = ("indexcache_jax", "pallas_kernels", "checkpoints_convert", "experiments")
FOLDERS = (*PACKAGES, "tests", "docs", "results")
# Flags of other programs that the pages name.
OTHER_FLAGS = {
    "tool", "racecheck-report", "kernel-name",  # compute-sanitizer
    "json-model-override-args", "model-path", "hf-overrides",  # SGLang, vLLM
    "help",
}  # fmt: skip


def lines_of_code(text: str) -> list[str]:
    """The lines of indented and fenced blocks, continued lines joined."""
    found, fenced = [], False
    for line in text.replace("\\\n", " ").split("\n"):
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            found.append(line.strip())
    return found


@functools.cache
def blocks(page: pathlib.Path) -> tuple[str, ...]:
    """The page's code: its lines of code, and inline code."""
    text = page.read_text(encoding="utf-8")
    inline = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return (*lines_of_code(text), *(" ".join(code.split()) for code in inline))


def commands(page: pathlib.Path, start: str) -> list[list[str]]:
    """The words after `start` of every command of the page that begins so, behind variables that it sets."""
    found = []
    for line in blocks(page):
        match = re.match(rf"(?:[A-Z_]+=\S+ +)*{re.escape(start)}(?: |$)", line)
        if match:
            found.append(shlex.split(line[match.end() :], comments=True))
    return found


@functools.cache
def defined_flags() -> frozenset[str]:
    """The flags that the experiments and checkpoints_convert define, read from their sources."""
    names = set()
    for path in [*(ROOT / "experiments").rglob("*.py"), *(ROOT / "checkpoints_convert").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.startswith("DEFINE_"):
                assert isinstance(node.args[0], ast.Constant), f"{path}: a flag whose name is not written out"
                names.add(node.args[0].value)
    return frozenset(names)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    kept = (c for c in heading.strip().lower() if c in " -_" or unicodedata.category(c)[0] in "LN")
    return "".join(kept).replace(" ", "-")


def anchors(page: pathlib.Path) -> set[str]:
    return {slug(line.lstrip("#")) for line in page.read_text(encoding="utf-8").split("\n") if re.match("#+ ", line)}


@pages
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}: no such heading"


@pages
def test_paths_exist(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w./*-]*", text):
        pattern = re.sub(r"\b[A-Z]{2,}\b", "*", path.rstrip("./"))  # a word in capitals stands for a name of one's own
        assert any(ROOT.glob(pattern)), f"{path} is not there"


@pages
def test_files_named_without_a_folder_exist(page):
    names = {path.name for folder in (*PACKAGES, "tests") for path in (ROOT / folder).rglob("*.py")}
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"(?<![\w/*{}-])(\w+\.py)\b", text):
        assert name in names, f"no file is called {name}"


@pages
def test_flags_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"(?<![\w-])--([a-z][\w-]*)", text):
        if not name.startswith("xla_"):
            assert name in defined_flags() | OTHER_FLAGS, f"--{name} is no flag"


def check_arguments(arguments: list[str]) -> None:
    """AssertionError unless experiments.run takes these arguments: a verb, and flags of it with values they can have."""
    arguments = command_line.with_flag(arguments)
    experiment = command_line.experiment_of(arguments)
    module = EXPERIMENTS[experiment]
    for name in ("experiments.run", module):
        importlib.import_module(name)
    known = {f.name: f for name in ("experiments.run", module) for f in flags.FLAGS.get_key_flags_for_module(name)}
    for argument in arguments:
        if argument == "--help":
            continue
        assert argument.startswith("--"), f"{argument} is not a flag"
        name, equals, value = argument[2:].partition("=")
        assert name in known, f"--{name} is no flag of {experiment}"
        assert equals or known[name].boolean, f"--{name} needs a value"
        if equals and value not in ("DIR", "NAME"):
            known[name].parser.parse(value)


@pages
def test_experiments_take_the_commands(page):
    for start in ("python -m experiments.run", command_line.SCRIPT):
        for arguments in commands(page, start):
            check_arguments(arguments)


@pages
def test_make_has_the_targets(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for words in commands(page, "make"):
        targets = [word for word in words if "=" not in word]
        assert targets, f"make {' '.join(words)} names no target"
        for target in targets:
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"make {target}"


def test_every_experiment_is_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in EXPERIMENTS if f"`{name}`" not in text] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 110


def test_code_cites_sections_that_exist():
    """As in `(docs/model.md, Indexer)`: the page is there, and a heading begins what follows the comma."""
    for folder in (*PACKAGES, "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            text = " ".join(path.read_text(encoding="utf-8").split())
            for name, cited in re.findall(r"(?<![\w/])(docs/\w+\.md)(?:, ([A-Z][\w ]*))?", text):
                page = ROOT / name
                assert page.exists(), f"{path} cites {name}"
                titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
                assert not cited or cited.startswith(tuple(titles)), f"{path} cites {name}, {cited}"


def test_the_quick_lane_names_tests_that_exist():
    dry = subprocess.run(["make", "-n", "quick"], cwd=ROOT, capture_output=True, text=True, check=True)
    named = re.findall(r"tests/[\w/]+\.py(?:::\w+)?", dry.stdout)
    assert len(named) > 10
    for test in named:
        path, _, function = test.partition("::")
        assert f"def {function}" in (ROOT / path).read_text(encoding="utf-8"), f"make quick: {test} is not there"


def test_the_readmes_python_runs(monkeypatch, capsys):
    """As it stands, from the top of the repository; it loads, generates, searches and distils on the shipped model."""
    (source,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(ROOT)
    names: dict = {}
    exec(compile(source, "README.md", "exec"), names)
    assert "use_index_cache" in capsys.readouterr().out  # vLLM's setting was printed
    assert names["found"].num_full == 11
    assert len(names["params"].indexer.queries) == 11


# ---- recipes and tutorial


def rows_of(page: str, heading: str) -> list[list[str]]:
    """The cells of the table under a heading of a page in docs/, without its header."""
    section = re.split(r"^## ", (ROOT / "docs" / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    (text,) = [part for part in section if part.startswith(f"{heading}\n")]
    lines = [line for line in text.split("\n") if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_what_8_bits_change_is_what_the_report_says():
    """Columns of the report that the page leaves out aside."""
    report = (ROOT / "results" / "precision" / "report.md").read_text(encoding="utf-8")
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.split("\n") if line[:1] == "|"]
    left_out = {header.index("KL of predictions"), header.index("worst layer")}
    kept = [[cell for i, cell in enumerate(row) if i not in left_out] for row in rows]
    assert rows_of("results.md", "8 bits in caches and weights") == kept


@contextlib.contextmanager
def given_flags(module: str, arguments: str) -> Iterator[None]:
    """Within, an experiment's flags are those of a command; afterwards as they were."""
    try:
        flags.FLAGS(["test", *shlex.split(arguments)])
        yield
    finally:
        for flag in flags.FLAGS.get_key_flags_for_module(module):
            flag.unparse()


def asked_of_the_doctor(arguments: str) -> doctor.Question:
    """What the doctor is asked with these flags."""
    with given_flags("experiments.doctor", arguments):
        return doctor.read_question(topologies.topology(options.TOPOLOGY.value, compiling=False))


def test_what_fits_is_what_the_doctor_says():
    rows = rows_of("recipes.md", "What fits")
    assert len(rows) == 11
    for _, command, needs, there, room, _ in rows:
        asked = asked_of_the_doctor(command.strip("`"))
        longest, most = int(room.replace(",", "")), asked.config.max_position_embeddings
        with device.target(asked.topology):
            here = asked.layout.abstract_mesh, asked.rules
            found, at_longest, beyond = (
                asked.inference(length, *here).total for length in (asked.length, longest, longest + CACHE_MULTIPLE)
            )
        memory_of_each = asked.topology.memory
        assert [needs, there] == [f"{size / 1e9:.2f}" for size in (found, memory_of_each)], command
        assert at_longest <= memory_of_each and (longest == most or beyond > memory_of_each), command


def test_what_a_search_needs_is_what_the_doctor_says():
    text = " ".join((ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").split())
    one, eight = (
        "--topology=h200:1 --weights=fp8 --context=32768",
        "--topology=h200:8 --weights=fp8 --context=8192 --batch_size=8",
    )
    for arguments, kind, sentence in (
        (f"--preset=glm-5 {one}", "search --stream", "a search needs {:.2f} GB of the device"),
        (f"--preset=deepseek-v3.2 {one}", "search --stream", "for DeepSeek-V3.2 {:.2f}"),
        (f"--preset=glm-5.2 {eight}", "search", "The search in memory needs {:.1f} GB"),
    ):
        asked = asked_of_the_doctor(arguments)
        with device.target(asked.topology):
            need = asked.searches()[kind](asked.context, asked.layout.abstract_mesh, asked.rules)
        assert sentence.format(need.total / 1e9) in text, arguments


def cost_of_a_search(given: str, config: Config, base: Schedule) -> search_cost.Cost:
    """What a dry run counts for these flags and weights in 8 bits."""
    with given_flags("experiments.search", f"--stream --stream_memory=64 {given}"):
        counted, table = search.costs(config, base, search.read_goal(base), "bfloat16")
    return counted + table


def size_in_8_bits(config: Config, base: Schedule) -> int:
    """Bytes of a checkpoint in 8 bits."""
    return memory.tree_bytes(params.abstract(config, base, "fp8"), "bfloat16", memory.mesh_of(), SERVING)


def test_what_a_search_takes_is_what_a_dry_run_says():
    config, base = inputs.preset_model("glm-5")
    size = size_in_8_bits(config, base)
    rows = rows_of("search.md", "What it takes")
    assert len(rows) == 6
    for flags_of_row, *said in rows[:-1]:  # the last takes longer to count than the others together
        given = flags_of_row.strip("`")
        cost = cost_of_a_search(given, config, base)
        rate, _ = search_cost.measured(config, 1, int(given.partition("--context=")[2].split()[0]))
        hours = [cost.seconds(search_cost.Rate(rate.layer, reading)) / 3600 for reading in (0, size / 3e9)]
        passes = len(cost.passes)
        counts = f"{cost.steps}", f"{cost.losses:,}", f"{passes:,}", f"{passes * size / 1e12:,.0f}"
        assert said == [*counts, *(f"{h:.1f}" for h in hours)], given
    (readme,) = commands(ROOT / "README.md", "python -m experiments.run --checkpoint=GLM-5-FP8")
    cost = cost_of_a_search(" ".join(flag for flag in readme if not flag.startswith("--text")), config, base)
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"reads the weights {len(cost.passes)} times, {len(cost.passes) * size / 1e12:.0f} TB" in text


def test_how_long_a_search_takes_is_what_a_dry_run_says():
    rows = rows_of("recipes.md", "How long a search takes")
    assert len(rows) == 12
    name = sequences = ""
    for *about, hours, passes, read in rows:
        name, sequences, blocks = about[0] or name, about[1] or sequences, about[2]
        preset = {"GLM-5, 5.1": "glm-5", "DeepSeek-V3.2": "deepseek-v3.2"}[name]
        count, context = (int(number.replace(",", "")) for number in sequences.split(" x "))
        config, base = inputs.preset_model(preset)
        given = f"--retentions=1/4 --blocks={blocks} --sequences={count} --context={context}"
        cost, (rate, source) = cost_of_a_search(given, config, base), search_cost.measured(config, 1, context)
        size = len(cost.passes) * size_in_8_bits(config, base)
        assert source.device == "NVIDIA H200"
        assert [hours, passes, read] == [f"{cost.seconds(rate) / 3600:.1f}", str(len(cost.passes)), f"{size / 1e12:.0f}"], given


@pytest.mark.slow
def test_the_tutorials_commands_run(tmp_path):
    """One after the other, as they stand, but for those of engines; what they are said to write is there."""
    for name in ("indexcache_jax", "experiments"):
        (tmp_path / name).symlink_to(ROOT / name)
    programs = "python -m experiments.run ", "python -m checkpoints_convert ", "mkdir ", "printf "
    code = lines_of_code((ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8"))
    run = [line for line in code if line.startswith(programs)]
    assert len(run) == 8
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "JAX_PLATFORMS": "cpu"}
    for line in run:
        command = re.sub(r"^python ", lambda _: f"{shlex.quote(sys.executable)} ", line)
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
        assert "Traceback" not in done.stderr and "UserWarning" not in done.stderr, line
    out = tmp_path / "out" / "tutorial"
    found = json.loads((out / "search" / "results.json").read_text())["metrics"]
    uniform, searched = (next(s for s in found["schedules"] if s["name"] == f"1/4 {name}") for name in ("uniform", "searched"))
    assert found["pattern"].count("F") == 3 and searched["held_out_loss"] < uniform["held_out_loss"]
    losses = json.loads((out / "distill" / "results.json").read_text())["metrics"]["held_out"]
    assert losses["all F"] < losses["distilled"] < losses["the schedule, untrained"]
    assert (out / "distill" / "checkpoint" / "model-00001-of-00002.safetensors").is_symlink()
    completions = [json.loads(line) for line in (out / "generate" / "completions.jsonl").read_text().splitlines()]
    assert [line["line"] for line in completions] == [1, 2] and all(line["completion"] for line in completions)
    assert json.loads((out / "quarter" / "config.json").read_text())["index_topk_pattern"] == "FFSSSFSSSSSS"


@pytest.mark.slow
def test_the_demo_runs(tmp_path):
    """What `make demo` runs: the command without arguments."""
    command = [sys.executable, "-m", "experiments.run", f"--output_dir={tmp_path}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert {path.name for path in tmp_path.iterdir()} >= {"results.json", "report.md", "loss.png", "overlap.png"}
