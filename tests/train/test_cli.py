"""The command line: what it prints, and one line of error with exit status 2 for every mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import attnkit
from attnkit.cli import doctor, main
from attnkit.cli.commands import app
from attnkit.cli.invocation import invocation
from attnkit.kernels import dispatch
from attnkit.kernels.reference import ReferenceBackend
from attnkit.registry import BACKENDS
from attnkit.testing import KINDS

ROOT = Path(__file__).parents[2]


def printed(capsys, *arguments):
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_list(capsys):
    assert printed(capsys, "list", "models").split() == attnkit.list_models()
    assert printed(capsys, "list", "primitives", "*window*").split() == ["random_window", "window"]
    backends = printed(capsys, "list", "backends").splitlines()
    assert [line.split()[0] for line in backends] == list(BACKENDS)
    planned = [line for line in backends if line.endswith(" (planned, not part of this version)")]
    assert [line.split()[0] for line in planned] == [name for name, target in BACKENDS.items() if not target]
    assert "sdpa" in backends
    assert printed(capsys, "list", "backends", "s*") == "sdpa\n"
    assert printed(capsys, "list").startswith("models: ")


def test_version(capsys):
    assert printed(capsys, "--version") == f"attnkit {attnkit.__version__}\n"


def test_show(capsys):
    assert '"kind": "pyramid"' in printed(capsys, "show", "bigbird_vit_micro")
    shown = printed(capsys, "show", "random_window")
    assert "Args:" in shown and "arXiv" in shown


def test_costs_and_backends_of_a_model(capsys):
    assert "MACs" in printed(capsys, "flops", "vit_micro", "--size", "32")
    assert "reference" in printed(capsys, "explain", "vit_micro", "--size", "32x32")


def test_explain_as_the_function_does(capsys):
    def title(*options):
        return printed(capsys, "explain", "vit_micro", "--size", "16", *options).partition(":")[0]

    assert title() == title("--device", "cpu") == "IsotropicModel on 16 x 16 pixels, evaluation, float32 on cpu"
    assert title("--training", "--dtype", "bfloat16").endswith("training, bfloat16 on cpu")
    assert title("--dtype", "float16").endswith("evaluation, float16 on cpu")


def test_explain_on_a_gpu_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["explain", "vit_micro", "--size", "16", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == (
        "error: --device cuda needs a GPU that PyTorch can use; `attnkit doctor` tells what it finds, and without "
        "--device the model is explained on the CPU\n"
    )


@pytest.mark.cuda
def test_explain_on_a_gpu(capsys):
    text = printed(capsys, "explain", "vit_micro", "--size", "16", "--device", "cuda", "--dtype", "bfloat16")
    assert "bfloat16 on cuda" in text.splitlines()[0]


def test_draw_a_primitive(capsys, tmp_path):
    for name in ("random_window", "topk_region"):
        path = tmp_path / f"{name}.png"
        assert printed(capsys, "draw", name, "--grid", "7x14", "--out", str(path)).strip() == str(path)
        assert path.stat().st_size > 1000
    printed(capsys, "draw", "window", "window=4", "--grid", "8", "--out", str(tmp_path / "w.png"))


def test_help_names_the_defaults(capsys):
    text = " ".join(printed(capsys, "train", "--help").split())
    assert "--resume" in text and "--baseline" in text and "0.002" in text
    assert "train" in printed(capsys) and printed(capsys, "train", "-h").split() == text.split()


def test_doctor(capsys, monkeypatch):
    # FlexAttention compiles for seconds for each kind of layout, which tests/kernels/test_flex.py does.
    ran = []
    monkeypatch.setattr("attnkit.kernels.flex._compiled", lambda: lambda q, k, v, **_: ran.append(v) or v)
    report = printed(capsys, "doctor")
    assert "flex on cpu: runs dense, stencil, blocks, token_sets, token_mask\n" in report
    assert len(ran) == 5
    assert f"attnkit {attnkit.__version__}" in report
    assert "reference on cpu: runs dense, stencil, blocks, token_sets, token_mask" in report
    assert "gather on cpu: runs stencil, blocks, token_sets\n    not dense: " in report
    assert "xformers on cpu: runs nothing: xformers has attention for cuda only" in report
    assert "    not blocks with routed regions: routed blocks see several runs of keys" in report
    assert "    not stencil: a stencil layout is no block-diagonal mask" in report
    assert report.count("xformers has attention for cuda only") == 1
    assert report.count("q lies on cpu, and its kernels are for GPUs") == 1


@pytest.mark.parametrize(("threads", "said"), [(1, "CPU with 1 thread"), (2, "CPU with 2 threads")])
def test_doctor_counts_threads(monkeypatch, threads, said):
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    monkeypatch.setattr(doctor, "BACKENDS", {})
    assert said in list(doctor.report())


def test_doctor_says_what_runs_in_part(monkeypatch):
    class Plain(ReferenceBackend):
        def why_not(self, call):
            return () if call.layout.key_mask is None else ("it takes no key mask",)

    monkeypatch.setitem(BACKENDS, "plain", "unused")
    monkeypatch.setitem(dispatch._backends, "plain", Plain())
    lines = doctor._try("plain", "cpu").splitlines()
    in_part = "stencil, blocks in part (windows, routed regions), token_sets in part (lists of keys), token_mask"
    assert lines[0].startswith(f"runs dense in part (all keys), {in_part}")
    assert "    not blocks with hidden keys: it takes no key mask" in lines


def test_doctor_knows_every_kind_of_layout():
    assert tuple(doctor.EXAMPLES) == KINDS
    for kind, examples in doctor.EXAMPLES.items():
        for make in examples.values():
            layout = make("cpu")
            assert layout.kind == kind and layout.num_keys == doctor.TOKENS


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "No such command 'trian'"),
        (["train", "--epohcs", "3"], "No such option: --epohcs"),
        (["train", "--model", "vit_micro"], "Missing option '--out'"),
        (["train", "--out", "x"], "nothing says what to train; pass --model NAME"),
        (["train", "--out", "x", "--model", "vit_micor"], "did you mean 'vit_micro'?"),
        (["train", "--out", "x", "--model", "vit_micro", "--epochs", "0"], "epochs=0: must be >= 1"),
        (["train", "--out", "x", "--model", "vit_micro", "--epochs", "two"], "--epochs two"),
        (
            ["train", "--out", "x", "--model", "vit_micro", "--img-size", "a"],
            "--img-size 'a' is no size; write 224, or height x width such as 96x160",
        ),
        (["train", "--out", "x", "--model", "vit_micro", "--data", "nowhere"], "data folder nowhere does not exist"),
        (["train", "--out", "x", "--model", "vit_micro", "--mixed-precision", "fp61"], "did you mean 'fp16'?"),
        (["train", "--out", "x", "--model", "vit_micro", "--set", "depht=3"], "did you mean 'depth'?"),
        (["train", "--out", "x", "--model", "vit_micro", "--baseline", "vit_micro"], "both called 'vit_micro'"),
        (["predict", "nowhere", "a.png"], "there is no checkpoint nowhere"),
        (["list", "modles"], "did you mean 'models'?"),
        (["show", "covn"], "did you mean 'conv'?"),
        (["explain", "vit_micor"], "did you mean 'vit_micro'?"),
        (["explain", "window"], "'window' is a primitive and not a model; `attnkit show window` tells of it"),
        (["explain", "vit_micro", "--device", "gpu"], "--device 'gpu' is not known; did you mean 'cuda'?"),
        (
            ["explain", "vit_micro", "--dtype", "half"],
            "--dtype 'half' is not known; did you mean 'float16'? (known: float32, ",
        ),
        (["bench", "list"], "cannot run 'list'; did you mean --list?"),
        (["bench", "gpu/regions/*"], "`attnkit bench --only 'gpu/regions/*'` runs the cases of that name"),
        (["explain", "vit_micro", "--device", "cud"], "--device 'cud' is not known; did you mean 'cuda'?"),
        (
            ["explain", "vit_micro", "--dtype", "half"],
            "'half' is not known; did you mean 'float16'? (known: float32, bfloat16, float16)",
        ),
        (["flops", "vit_micro", "--size", "0"], "--size 0 must be at least 1 a side"),
        (["flops", "vit_micro", "--size", "32x"], "--size '32x' is no size; write 224, or height x width such as"),
        (["flops", "vit_micro", "--size", "100000"], "--size 100000 is too large; it must be at most 16384 a side"),
        (["flops", "vit_micro", "--size", "9" * 5000], "is no size"),
        (["draw", "window", "--grid", "8x-8"], "--grid 8x-8 must be at least 1 a side"),
        (["draw", "widnow"], "did you mean 'window'?"),
        (["draw", "window", "windwo=3"], "did you mean 'window'?"),
        (["draw", "window", "window"], "must be OPTION=VALUE"),
        (["draw", "run", "heads=2", "--image", "a.png"], "which takes no options"),
    ],
)
def test_mistakes_are_one_line(capsys, monkeypatch, tmp_path, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and output.err.count("\n") == 1
    assert said in output.err
    assert not (tmp_path / "x").exists()


def complaints(capsys, *arguments):
    assert main([*arguments, "--out", "nowhere"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    return "\n".join(lines)


def test_independent_mistakes_are_told_together(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = complaints(capsys, "train", "--model", "vit_micro", "--lr", "-1", "--batch-size", "0", "--set", "foo=3")
    assert "lr=-1.0: must be > 0" in told and "batch_size=0: must be >= 1" in told and "option 'foo'" in told
    told = complaints(capsys, "train", "--img-size", "3x", "--set", "a", "--set", "b", "--baseline", "vit_micor")
    for each in (
        "--img-size '3x'",
        "--set 'a'",
        "--set 'b'",
        "did you mean 'vit_micro'?",
        "nothing says what to train",
    ):
        assert each in told
    file = tmp_path / "bad.yaml"
    file.write_text("model: {kind: vit_micro, drop_pth: 0.1}\ntrain: {epohcs: 3}\n", encoding="utf-8")
    told = complaints(capsys, "train", "--config", str(file))
    assert "did you mean 'drop_path'?" in told and "did you mean 'epochs'?" in told
    file.write_text("modle: vit_micro\ntrain: 3\n", encoding="utf-8")
    told = complaints(capsys, "train", "--config", str(file), "--lr", "-1")
    assert "did you mean 'model'?" in told and "section 'train' must be a mapping, but got 3" in told
    assert "lr=-1.0" in told and "nothing says what to train" not in told
    assert not (tmp_path / "nowhere").exists()


def test_a_model_and_a_file_with_a_model_contradict(capsys, tiny_config, tmp_path):
    assert main(["train", "--config", str(tiny_config), "--model", "vit_micro", "--out", str(tmp_path / "x")]) == 2
    assert "both say what to train" in capsys.readouterr().err


def test_too_little_memory_is_one_line(monkeypatch, capsys):
    def greedy(*_):
        import torch

        torch.zeros(2**60)

    monkeypatch.setattr("attnkit.registry.list_models", greedy)
    assert main(["list", "models"]) == 2
    assert "error: there is not enough memory for this" in capsys.readouterr().err


def test_errors_of_the_program_are_not_hidden(monkeypatch):
    def broken(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr("attnkit.registry.list_models", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["list", "models"])


def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typer", None)
    assert main(["list"]) == 2
    assert "pip install 'attnkit[train]'" in capsys.readouterr().err


@pytest.fixture
def program(tmp_path):
    """The script `attnkit` as an installer writes it, in an environment below the working directory."""
    script = tmp_path / ".venv" / "bin" / "attnkit"
    script.parent.mkdir(parents=True)
    script.write_text(f"#!{sys.executable}\nimport sys\nfrom attnkit.cli import main\nsys.exit(main())\n")
    script.chmod(0o755)
    return script


def test_suggested_commands_work_as_typed(program, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin")
    for called in (".venv/bin/attnkit", str(program)):
        monkeypatch.setattr(sys, "argv", [called, "train"])
        assert invocation() == ".venv/bin/attnkit"
    monkeypatch.chdir(program.parent)
    assert invocation() == str(program)
    monkeypatch.setenv("PATH", f"/usr/bin:{program.parent}")
    assert invocation() == "attnkit"
    monkeypatch.setattr(sys, "argv", [str(ROOT / "attnkit" / "cli" / "__main__.py"), "train"])
    assert invocation() == f"{sys.executable} -m attnkit.cli"
    monkeypatch.setattr(sys, "argv", ["notebook"])
    assert invocation() == "attnkit"


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="runs a script by its first line")
def test_what_the_demo_suggests_at_its_end(program, tmp_path):
    train = ".venv/bin/attnkit train --model vit_micro --epochs 1 --img-size 8 --out 'my runs/demo'"
    environment = {**os.environ, "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}

    def typed(line):
        done = subprocess.run(
            ["sh", "-c", line], check=True, capture_output=True, text=True, cwd=tmp_path, env=environment
        )
        return done.stdout.splitlines()

    suggested = typed(train)[-1]
    assert suggested.startswith("try  ")
    [answer] = typed(suggested.removeprefix("try"))
    assert answer.startswith("my runs/demo/samples/7.png: ")


def test_the_page_on_training_lists_every_command():
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    verbs = [command.name or command.callback.__name__ for command in app.registered_commands]
    assert "draw" in verbs and "train" in verbs
    assert [verb for verb in verbs if f"attnkit {verb}" not in page] == []


def test_listing_loads_nothing_of_training():
    code = "import sys; from attnkit.cli import main; main(['list']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert not {"accelerate", "matplotlib", "sklearn", "PIL", "yaml"} & set(done.stdout.splitlines()[-1].split())
