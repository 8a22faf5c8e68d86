"""The command line as a user meets it: what it answers, and one line for each mistake."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from PIL import Image

import unimim
from unimim.cli.main import TASKS, main

MASKDISTILL = str(ROOT / "conf/pretrain/maskdistill_vit_base.yaml")
SMALL = [
    "fit",
    "--config",
    MASKDISTILL,
    "--model.teacher=PixelTarget",
    "--model.teacher.patch_size=8",
    "--model.student.model_args={img_size: 32, patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2, init_values: 0.1}",
    "--data.image_size=32",
    "--data.batch_size=2",
    "--data.num_workers=0",
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
    "--trainer.enable_progress_bar=false",
]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for i in range(4):
        Image.new("RGB", (50 + i, 40), (60 * i, 20, 100)).save(tmp_path / f"{i}.jpg")
    return tmp_path


def run_unimim(*words: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "unimim", *words],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def mistake(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line with which a wrong command ends."""
    with pytest.raises(SystemExit) as end:
        main(["pretrain", *words])
    assert isinstance(end.value.code, str)
    assert "\n" not in end.value.code
    assert end.value.code.startswith("unimim: error: ")
    assert "Traceback" not in capsys.readouterr().err
    return end.value.code


@pytest.mark.parametrize("words", [["--help"], ["-h"], [], ["--version"], ["pretrian"], ["pretrain", "fti"]])
def test_the_first_answers_come_without_torch(words: list[str]) -> None:
    code = (
        f"import sys; from unimim.cli.main import main\ntry:\n    main({words})\n"
        f"finally:\n    assert not {{'torch', 'pytorch_lightning', 'jsonargparse'}} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert "Traceback" not in said
    if words == ["pretrain", "fti"]:
        assert done.returncode
        assert said == "unimim: error: there is no subcommand of pretrain 'fti'. Did you mean 'fit'? Known: fit\n"
    elif words == ["pretrian"]:
        assert done.returncode
        known = "pretrain, finetune, segment, probe, knn, export, sweep"
        assert said == f"unimim: error: there is no task 'pretrian'. Did you mean 'pretrain'? Known: {known}\n"
    else:
        assert not done.returncode
        assert unimim.__version__ in said if words == ["--version"] else "pretrain fit --config" in said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model.teacher", "HOGG"], "model.teacher: there is no class 'HOGG'. Did you mean 'HOGTarget'?"),
        (["--model.teacher", "unimim.HOGG"], "model.teacher: there is no class 'HOGG'. Did you mean 'HOGTarget'?"),
        (
            ["--model.masking", "BlokMasking"],
            "Did you mean 'BlockMasking'? Known: AttentiveMasking, BlockMasking, NoMasking, RandomMasking",
        ),
        (
            ["--model.normalization", "L2"],
            "Did you mean 'L2Norm'? Known: CenteredSoftmax, InstanceNorm, L2Norm, LayerNorm, torch.nn.Identity",
        ),
        (["--model.loss", "torch.nn.MSLoss"], "Did you mean 'torch.nn.MSELoss'?"),
        (["--model.teacher.netwrk", "x"], "model.teacher: unimim.FeatureTarget takes no 'netwrk'. Did you mean 'network'?"),
        (
            ["--model.student.embed_dim", "24"],
            "takes no 'embed_dim'; timm's arguments are given as --model.student.model_args.embed_dim",
        ),
        (["--model.lrr", "1"], "there is no option --model.lrr. Did you mean '--model.lr'?"),
        (["--model.masking.ratio", "half"], "model.masking.ratio: expected float or tuple, got half"),
        (["--model.head.widht", "3"], "model.head: unimim.LinearHead takes no 'widht'. Did you mean 'init'? Known: init"),
        (
            ["--model.loss", "CosinLoss"],
            "there is no class 'CosinLoss'. Did you mean 'CosineLoss'? Known: CosineLoss, torch.nn.",
        ),
        (["--model.teacher", "nowhere.Missing"], "model.teacher: No module named 'nowhere'"),
        ([], "data.root is missing: give --data.root"),
        (["--config", "nowhere.yaml"], "File does not exist"),
    ],
)
def test_mistakes_in_words(capsys: pytest.CaptureFixture[str], words: list[str], expected: str) -> None:
    assert expected in mistake(capsys, "fit", "--config", MASKDISTILL, *words)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--model.masking.ratio", "1.5"],
            "model.masking.ratio is 1.5, but a share of patches to hide lies between 0 and 1",
        ),
        (["--model.masking.ratio", "0.01"], "model.masking.ratio 0.01 hides no patch of a grid of 16"),
        (["--model.masking.ratio", "0.99"], "model.masking.ratio 0.99 hides every patch of a grid of 16"),
        (["--model.masking.ratio", "[0.5, 0.2]"], "lies between 0 and 1, or is two of them, the lower one first"),
        (["--model.masking", "RandomMasking", "--model.masking.unit", "3"], "the student's grid of 4x4 patches is no multiple"),
        (["--model.masking", "NoMasking"], "NoMasking leaves no patch for the loss, which is on the masked ones"),
        (["--model.masking", "AttentiveMasking"], "samples by a teacher's attention, and PixelTarget has none"),
        (
            ["--model.loss", "torch.nn.CrossEntropyLoss"],
            "which PixelTarget with LayerNorm does not give: set model.loss to a reg",
        ),
        (["--model.teacher", "MeanColorTarget"], "model.normalization: LayerNorm does not take the torch.int64 of MeanColor"),
        (
            ["--model.teacher", "MeanColorTarget", "--model.normalization", "torch.nn.Identity"],
            "MeanColorTarget is discrete, and SmoothL1Loss is not for its logits: set model.loss to torch.nn.CrossEntropyLoss",
        ),
        (["--model.loss", "torch.nn.CTCLoss"], "model.loss: CTCLoss does not take prediction and target of"),
        (["--model.head", "PromptingDecoderHead"], "model.head: PromptingDecoderHead needs a student that drops patches"),
        (["--model.head", "DecoderHead", "--model.head.width=30"], "model.head: width 30 is no multiple of num_heads 16"),
        (["--model.student", "VisibleStudent"], "beit_base_patch16_224 needs the whole grid and cannot drop patches"),
        (
            ["--model.teacher", "VQKDTarget"],
            "VQKDTarget needs the published file of BEiT v2's tokenizer: --model.teacher.weights",
        ),
        (
            ["--model.teacher", "DVAETarget"],
            "DVAETarget needs a file with the state dict of DALL-E's encoder: --model.teacher.",
        ),
        (["--model.teacher=DVAETarget", "--model.teacher.weights=no.pt"], "there is no file no.pt to read weights from"),
        (["--model.teacher=EMATarget", "--model.teacher.top_blocks=9"], "model.teacher.top_blocks is 9, but beit_base_patch"),
        (
            ["--model.teacher=EMATarget", "--model.teacher.momentum=2"],
            "model.teacher.momentum is 2.0, final_momentum None, but",
        ),
        (["--model.student.backbone", "vit_bse_patch16_224"], "timm has no model 'vit_bse_patch16_224'. Nearest: "),
        (["--model.student.model_args", "{dept: 1}"], "does not take these model_args"),
        (["--model.teacher.patch_size", "16"], "do not meet: 32x32 pixels on a 4x4 grid are patches of 8 pixels"),
        (["--data.image_size", "64"], "images are 64x64 pixels, but beit_base_patch16_224 was built for 32x32"),
        (["--data.batch_size", "9"], "has 4 images, which is less than one batch of 9: set data.batch_size to 4 or less"),
        (["--ckpt_path", "nowhere.ckpt"], "ckpt_path: nowhere.ckpt does not exist"),
        (["--ckpt_path", "0.jpg"], "ckpt_path: 0.jpg is truncated, or no checkpoint"),
        (["--ckpt_path", "last"], "ckpt_path: last names no file: give its path, such as outputs/pretrain/version_0/"),
        (["--model.lr", "0"], "model: lr above 0, weight_decay not below 0"),
        (["--trainer.max_epochs=-1"], "an endless training has no cosine"),
        (["--model.student.model_args.num_heads", "7"], "beit_base_patch16_224"),
        (["--data.root", "/nowhere"], "data.root: there is no folder /nowhere"),
        (["--trainer.precision", "bf15"], "trainer.precision"),
    ],
)
def test_mistakes_in_values(
    capsys: pytest.CaptureFixture[str], photos: Path, words: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos)
    assert expected in mistake(capsys, *SMALL, "--data.root", str(photos), *words)


def test_weights_that_cannot_be_had(capsys: pytest.CaptureFixture[str], photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, the teacher's weights are asked for by file or by name of the option, and never replaced in silence."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it asks five times, for 50 s
    monkeypatch.setenv("HF_HOME", str(photos))
    line = mistake(capsys, "fit", "--config", MASKDISTILL, "--data.root", str(photos))
    assert "weights of 'vit_base_patch16_clip_quickgelu_224.openai' cannot be had" in line
    assert "weights=PATH" in line
    assert "--random_weights" in line
    assert sorted(path.suffix for path in photos.iterdir() if path.is_file()) == [".jpg"] * 4
    line = mistake(capsys, "fit", "--config", MASKDISTILL, "--data.root", str(photos), "--model.teacher.weights", "no.pt")
    assert line == "unimim: error: there is no file no.pt to read weights from"


def test_an_unreadable_image_in_a_worker_is_one_line(capsys: pytest.CaptureFixture[str], photos: Path) -> None:
    (photos / "broken.png").write_bytes(b"no image")
    line = mistake(
        capsys,
        *SMALL,
        f"--data.root={photos}",
        "--data.batch_size=5",
        "--data.num_workers=1",
        f"--trainer.default_root_dir={photos}",
        "--trainer.logger=false",
        "--pictures=false",  # which would look at it before a worker does
    )
    assert "unreadable image" in line
    assert "broken.png" in line


def test_a_users_own_bug_keeps_its_traceback(photos: Path) -> None:
    (photos / "buggy.py").write_text(
        "import torch\nfrom unimim import TargetGenerator\n\n\nclass Buggy(TargetGenerator):\n    dim = 3\n\n"
        "    def forward(self, images, grid_size):\n        return images.no_such_method()\n"
    )
    done = run_unimim("pretrain", *SMALL, "--data.root=.", "--model.teacher=buggy.Buggy", cwd=photos)
    assert done.returncode
    assert "buggy.py" in done.stderr
    assert "no_such_method" in done.stderr


def test_a_target_of_ten_lines_in_the_users_own_file(photos: Path) -> None:
    """Found from the working directory; trains, saves, and the encoder comes back from the file."""
    (photos / "mytarget.py").write_text(
        '''from einops import reduce
from unimim import TargetGenerator


class MeanColor(TargetGenerator):
    """The mean colour of each patch."""

    dim = 3

    def forward(self, images, grid_size):
        h, w = grid_size
        return reduce(images, "b c (h p) (w q) -> b h w c", "mean", h=h, w=w)
'''
    )
    done = run_unimim("pretrain", *SMALL, "--data.root=.", "--model.teacher=mytarget.MeanColor", cwd=photos)
    assert done.returncode == 0, done.stderr
    assert "T  teacher        MeanColor" in done.stdout
    assert "2 images a step (1 devices x 2 x 1 accumulated), peak lr 0.0015" in done.stdout
    (checkpoint,) = photos.rglob("*.ckpt")
    assert f"checkpoint: {checkpoint}" in done.stdout or str(checkpoint.relative_to(photos)) in done.stdout
    assert unimim.load_backbone(checkpoint).num_features == 24


def test_short_names_and_a_ratio_on_the_command_line(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--model.masking.ratio` after the config wins; the file says so when it is loaded again."""
    monkeypatch.chdir(photos)
    main(["pretrain", *SMALL, "--data.root=.", "--model.masking.ratio=0.6", "--model.teacher=HOGTarget",
          "--model.teacher.patch_size=8", "--model.teacher.cell_size=4"])  # fmt: skip
    (checkpoint,) = photos.rglob("*.ckpt")
    model = unimim.MaskedImageModeling.load_from_checkpoint(checkpoint, weights_only=True)
    assert model.masking.ratio == 0.6
    assert isinstance(model.teacher, unimim.HOGTarget)
    assert isinstance(model.loss, torch.nn.SmoothL1Loss)
    assert (photos / "outputs" / "pretrain" / "version_0" / "config.yaml").is_file()


def test_random_weights_are_announced(capsys: pytest.CaptureFixture[str], photos: Path) -> None:
    """The switch reaches every network that could be pretrained, nested ones too, and says which."""
    from unimim.cli.tasks import pretrain

    words = ["--model.teacher={class_path: FeatureTarget, init_args: {dim: 112, resolution: 64, mean: [0.5, 0.5, 0.5], "
             "std: [0.5, 0.5, 0.5], network: {class_path: unimim.EfficientNetLite0}}}"]  # fmt: skip
    off = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.max_steps=1", "--pictures=false"]
    model = pretrain([*SMALL, f"--data.root={photos}", *words, *off, "--random_weights"]).model
    said = capsys.readouterr().out
    assert "WARNING: --random_weights" in said
    assert "model.teacher (FeatureTarget)" not in said  # it has no network of timm's
    assert "model.teacher.network (EfficientNetLite0)" in said
    real = unimim.EfficientNetLite0().state_dict()["stem.0.weight"]
    assert not torch.equal(model.teacher.frozen.network.state_dict()["stem.0.weight"], real)


def test_a_run_goes_on_from_its_checkpoint(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two epochs and two more from the file end where four epochs end: step, schedule and optimizer."""
    monkeypatch.chdir(photos)
    from unimim.cli.tasks import pretrain

    whole = ["--data.root=.", "--data.batch_size=4", "--data.crop_scale=[1.0, 1.0]", "--data.flip=0", "--data.color_jitter=0",
             "--model.student.model_args.drop_path_rate=0", "--model.warmup_epochs=1", "--trainer.max_epochs=4"]  # fmt: skip
    through = pretrain([*SMALL, *whole, "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_top_k=-1"])
    (halfway,) = photos.rglob("*epoch=1*.ckpt")
    again = pretrain([*SMALL, *whole, f"--ckpt_path={halfway}"])
    assert again.trainer.global_step == through.trainer.global_step == 4
    optimizers = [cli.trainer.optimizers[0] for cli in (again, through)]
    assert optimizers[0].param_groups[0]["lr"] == optimizers[1].param_groups[0]["lr"]
    steps = [{float(state["step"]) for state in optimizer.state.values()} for optimizer in optimizers]
    assert steps == [{4.0}, {4.0}]


def test_what_is_given_counts_when_a_run_goes_on(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's own command line would put the checkpoint's hyperparameters over it without a word."""
    monkeypatch.chdir(photos)
    from unimim.cli.tasks import pretrain

    pretrain([*SMALL, "--data.root=."])
    (checkpoint,) = photos.rglob("*.ckpt")
    again = pretrain(
        [*SMALL, "--data.root=.", f"--ckpt_path={checkpoint}", "--model.masking.ratio=0.6", "--trainer.max_epochs=2"]
    )
    assert again.model.masking.ratio == 0.6
    assert again.trainer.global_step == 4


def test_a_typo_in_ones_own_module_lists_what_is_there(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ownmodule.py").write_text("from unimim import PixelTarget\n\nclass Gray(PixelTarget):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    said = mistake(capsys, "fit", "--config", MASKDISTILL, "--model.teacher", "ownmodule.Grey")
    assert "there is no class 'Grey'. Did you mean 'ownmodule.Gray'? Known: ownmodule.Gray" in said


def test_teacher_weights_from_a_file(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CLIP-shaped teacher, one block of it, with its weights in a file of the user's."""
    monkeypatch.chdir(photos)
    name, depth = "vit_base_patch16_clip_quickgelu_224.openai", {"depth": 1, "embed_dim": 24, "num_heads": 2}
    weights = unimim.FeatureTarget(name, weights="random", model_args=depth).frozen.network.state_dict()
    torch.save(weights, "clip.pt")
    from unimim.cli.tasks import pretrain

    words = ["--model.teacher=FeatureTarget", f"--model.teacher.network={name}", f"--model.teacher.model_args={depth}"]
    model = pretrain([*SMALL, "--data.root=.", *words, "--model.teacher.weights=clip.pt"]).model
    loaded = model.teacher.frozen.network.state_dict()
    assert all(torch.equal(loaded[key].cpu(), value) for key, value in weights.items() if key != "pos_embed")
    (checkpoint,) = photos.rglob("*.ckpt")
    assert checkpoint.stat().st_size < 1_000_000


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("unimim ", list(TASKS)),
        ("unimim pre", ["pretrain"]),
        ("unimim segment ", ["fit", "validate", "predict"]),
        ("unimim segment v", ["validate"]),
        ("unimim segment fit --con", []),
        ("unimim knn out", []),
    ],
)
def test_a_shell_completes_tasks_and_subcommands(line: str, expected: list[str], tmp_path: Path) -> None:
    """As `register-python-argcomplete unimim` makes bash ask, which completes files itself where nothing is answered."""
    pytest.importorskip("argcomplete")
    answer = tmp_path / "answer"
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_SHELL": "bash", "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
             "_ARGCOMPLETE_STDOUT_FILENAME": str(answer), "COMP_LINE": line, "COMP_POINT": str(len(line))}  # fmt: skip
    done = run_unimim(**asked)
    assert done.returncode == 0, done.stderr
    assert answer.read_text().split() == expected
