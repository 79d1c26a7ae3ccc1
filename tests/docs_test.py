"""Every command, program and link in the README and in docs/ works; long trainings are stood in for."""

import ast
import importlib
import json
import re
import runpy
import shlex
import shutil
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from sklearn import datasets

from configs import digits
from ffl_jax import data, deployment
from ffl_jax.data.base import SOURCES
from ffl_jax.devices import parallel
from ffl_jax.errors import CheckpointError
from ffl_jax.measure import speed
from ffl_jax.methods import METHODS
from ffl_jax.models import NETWORKS
from ffl_jax.reporting import report, runs
from ffl_jax.training import config, loop, steps, sweep
from ffl_jax.workdir import files
from ffl_jax.workdir.log import read_metrics

PAGES = sorted(path.relative_to(ROOT) for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
# What begins so is no command of this package: launch_test.py and CI run the scripts, and other people test
# theirs.
OTHERS = (
    *("./launch/", "pip ", "bash ", "sbatch ", "export ", "gcloud ", "docker ", "sed ", "kubectl "),
    *("./benchmarks/", "python benchmarks/", "python tests/", "python docs/example.py"),
)


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.S | re.M)


def commands_of(page):
    """(words of each command, without comments and variables before it)"""
    for block in blocks(page, "sh"):
        block = re.sub(r"<<'END'\n.*?\nEND$", "", block, flags=re.S | re.M).replace("\\\n", " ")
        if re.search(r"^for ", block, re.M):  # a loop of the shell, shown to prepare data
            block = block[block.rindex("ln -s") :].partition("\n")[2]
        for line in block.splitlines():
            line = re.sub(r'^(?:[A-Z_]+=(?:"[^"]*"|\S*) +)+', "", line.strip())
            if line and not line.startswith("#"):
                yield line


@pytest.fixture(scope="module")
def one_run(tmp_path_factory):
    """The only training: FFL on the digits, for an epoch."""
    workdir = tmp_path_factory.mktemp("docs") / "run"
    loop.train(digits.get_config("network=tiny,epochs=1"), workdir)
    return workdir


@pytest.fixture
def user(one_run, tmp_path, monkeypatch):
    """A folder with what the pages speak of, and `run(line)`, which trains nothing but copies `one_run`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    images, labels = datasets.load_digits(return_X_y=True)
    for index, (pixels, label) in enumerate(zip(images[:170], labels, strict=False)):
        folder = tmp_path / "my_images" / ("train" if index < 140 else "test") / f"class_{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.uint8(pixels.reshape(8, 8) * 15).repeat(4, 0).repeat(4, 1)).save(
            folder / f"{index}.png"
        )
    with open(tmp_path / "my_images/photos.csv", "w") as table:
        table.write("file,species,split\n")
        for path in sorted((tmp_path / "my_images").rglob("*.png")):
            split, species, name = path.relative_to(tmp_path / "my_images").parts
            table.write(f"{split}/{species}/{name},{species},{split}\n")
    pixels = np.uint8(images.reshape(-1, 8, 8) * 15)
    arrays = {"train": slice(0, 200), "val": slice(200, 250), "test": slice(250, 300)}
    np.savez(
        tmp_path / "pathmnist.npz",
        **{f"{name}_images": pixels[part] for name, part in arrays.items()},
        **{f"{name}_labels": labels[part, None] for name, part in arrays.items()},
    )
    for name in ("photo.jpg", "more_photos/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.uint8(images[0].reshape(8, 8) * 15)).save(tmp_path / name)
    ran = []

    def trained(settings, workdir, dataset=None):
        config.check(settings)
        parallel.Parallel(mode=settings.parallel.mode)
        ran.append(settings.method.name)
        workdir = tmp_path / workdir
        for seed in range(settings.seed, settings.seed + settings.num_seeds):
            folder = workdir / f"seed_{seed}" if settings.num_seeds > 1 else workdir
            shutil.copytree(one_run, folder, dirs_exist_ok=True)
            about = {"method": settings.method.name, "seed": seed, "dataset": settings.data.name}
            summary = json.loads((folder / "summary.json").read_text()) | about
            files.write_json(folder / "summary.json", summary)
        return summary

    class NoBenchmark:
        def __init__(self, settings, *_, **__):
            config.check(settings)

        def __getattr__(self, name):
            return lambda *_: ran.append(name) or {}

        rows = machine = ()

    def reported(folders, output):
        _, unusable, damaged = runs.read(folders)  # or refused
        assert not unusable
        assert not damaged
        return [output]

    monkeypatch.setattr(report, "write", reported)  # report_test.py draws
    monkeypatch.setattr(loop, "train", trained)
    monkeypatch.setattr(sweep, "run", lambda words, *_: run(f"python -m {shlex.join(words[2:])}") or 0)
    monkeypatch.setattr(speed, "Benchmark", NoBenchmark)

    def run(line):
        words = shlex.split(line, comments=True)
        assert words[:2] == ["python", "-m"], f"no command of this package: {line}"
        module = importlib.import_module(words[2])
        module.command(words[2:])

    for workdir in ("runs/a", "runs/b", "runs/digits_ffl_resnet8_seed0", "runs/digits"):
        shutil.copytree(one_run, tmp_path / workdir)
    return run


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands(page, user, tmp_path):
    for line in commands_of(page):
        if line.startswith(OTHERS) or "--distributed" in line:  # processes_test.py joins processes
            continue
        if "import_weights" in line:  # its own tests have such files
            with pytest.raises(CheckpointError, match=r"modelleader_best\.pth|Model_300\.pth"):
                user(line)
            continue
        user(line)
    if page.name == "deploy.md":
        found = {}
        for block in blocks(page, "python"):
            exec(block, found)
        images = np.zeros((5, *found["card"]["image_size"], 3), np.uint8)
        model = deployment.load("sub_0.onnx")
        np.testing.assert_array_equal(found["logits"], model.logits(images))


def test_the_worked_example(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(sys, "argv", ["example.py", f"--output={tmp_path}", "--network=tiny", "--epochs=2"])
    runpy.run_path(str(ROOT / "docs/example.py"), run_name="__main__")
    text = capsys.readouterr().out
    rates = re.findall(r"(?:top-1|summary says) ([\d.]+) %", text)
    assert len(rates) == 2
    assert rates[0] == rates[1]
    both = re.findall(r"after epoch (\d+): the networks disagree on (\d+) of 360 images", text)
    assert [epoch for epoch, _ in both] == ["1", "2"]
    # What the run itself logged.
    rows, _ = read_metrics(tmp_path / "run" / "metrics.jsonl")
    logged = [360 * row["diversity/disagreement"] for row in rows if row["split"] == "test"]
    np.testing.assert_allclose([int(count) for _, count in both], logged, atol=1e-6)
    with Image.open(tmp_path / "disagreements.png") as image:
        assert image.width > 1000


def test_links_lead_somewhere():
    for page in PAGES:
        text = (ROOT / page).read_text()
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)|src=\"([^\"]+)\"", text):
            target = "".join(target)
            if not target.startswith("http"):
                assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"
        for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", text):
            if not target.startswith("http"):
                text = ((ROOT / page).parent / (target or page.name)).read_text()
                headings = re.findall(r"^#+ (.*)", text, re.M)
                slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in slugs, f"{page}: {target}#{anchor}"


def test_every_page_can_be_found():
    text = (ROOT / "README.md").read_text()
    assert not [page for page in PAGES if page.name != "README.md" and f"docs/{page.name}" not in text]


def test_files_that_are_named_are_there():
    """In the repository or, where a page speaks of its rooms, in the package."""
    named = {
        name
        for page in PAGES
        for name in re.findall(r"`(\w[\w/]*/\w+\.(?:py|csv|sh|sbatch|yaml))`", (ROOT / page).read_text())
        if not name.endswith(("/x.py", "/NAME.py", "/stripes.py"))  # a reader's own
    }
    assert not [name for name in named if not any((ROOT / top / name).exists() for top in ("", "ffl_jax"))]


def test_rooms_import_only_from_below():
    """The table of rooms has all of them, in an order that no module's imports go against."""
    text = (ROOT / "docs/extending.md").read_text().partition("| room |")[2].partition("\n\n")[0]
    row = {
        name.removesuffix("/").removesuffix(".py"): number
        for number, line in enumerate(text.splitlines())
        for name in re.findall(r"`([\w/]+(?:/|\.py))`", line.split("|")[1] if number > 1 else "")
    }
    package = ROOT / "ffl_jax"
    rooms = {path.stem for path in package.glob("[a-z]*") if path.is_dir() or path.suffix == ".py"}
    assert set(row) == rooms
    for path in package.rglob("*.py"):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        for node in ast.parse(path.read_text()).body if room != "__init__" else ():
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "ffl_jax":
                inside = node.module.split(".")[1:2]
                for name in inside or [alias.name for alias in node.names]:
                    if name in row and name != room:
                        assert row[name] >= row[room], f"{path}: {room} imports {name}"


def test_the_smallest_method_is_shown_as_it_is():
    (diff,) = blocks("docs/extending.md", "diff")
    added = {}
    for line in diff.splitlines():
        if line.startswith("+++ "):
            lines = added.setdefault(line.removeprefix("+++ b/"), [])
        elif line.startswith("+"):
            lines.append(line[1:])
    assert list(added) == ["ffl_jax/methods/__init__.py", "ffl_jax/methods/independent.py"]
    package, method = (ROOT / path for path in added)
    assert added["ffl_jax/methods/independent.py"] == method.read_text().splitlines()
    (line,) = added["ffl_jax/methods/__init__.py"]
    assert line in package.read_text().splitlines()
    sizes = {name: len((method.parent / f"{name}.py").read_text()) for name in METHODS}
    assert min(sizes, key=sizes.get) == "independent"


def test_the_network_and_the_dataset_that_are_shown():
    """Cut into trunk and branches, and with stripes that can be told apart at once."""
    try:
        runpy.run_path(ROOT / "docs/own/choir.py")
        settings = digits.get_config("network=plain,epochs=1")
        settings.data.update(name="stripes", flip=False, pad=0)
        assert settings.subnetworks.shared_stages == 2
        loaded = data.load(settings.data)
        assert loaded.class_names == ("horizontal", "vertical")
        rows = loaded.train.images.mean((2, 3)).astype(float)  # horizontal stripes: rows differ
        spread = np.abs(rows[:, ::2].mean(1) - rows[:, 1::2].mean(1))
        assert ((spread > 30) == (loaded.train.labels == 0)).mean() > 0.99
        from ffl_jax import methods

        method = methods.build(settings, 2)
        params, _ = jax.eval_shape(
            lambda: steps.init_variables(method, jax.random.key(0), loaded.train.image_shape)
        )
        assert params["subnetworks"]["trunk"].keys() >= {"stem_conv", "stage1_conv", "stage2_conv"}
        assert params["subnetworks"]["branches"]["stage3_conv"]["kernel"].shape == (2, 3, 3, 32, 64)
    finally:
        for registry, name in ((METHODS, "choir"), (NETWORKS, "plain"), (SOURCES, "stripes")):
            registry.pop(name, None)
