"""Every kind of model spec, and weights."""

from __future__ import annotations

import os
import pickle
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command import run
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import saliency_fast as sf
from saliency_fast import zoo
from saliency_fast.cli.arguments import load_model
from saliency_fast.errors import InputError

FAST = ("--method-arg", "steps=2")


def usable(name):
    """Skips where an optional package is missing or broken."""
    try:
        return __import__(name, fromlist=["_"])
    except Exception as error:
        pytest.skip(f"{name} does not import: {error}")


@pytest.mark.parametrize("spec", ["digits", "digits-vit"])
def test_the_zoo(colour_png, spec):
    loaded = load_model(spec)
    x = loaded.prepare(Image.open(colour_png))
    assert x.shape == (1, 1, 64, 64)
    assert loaded.model(x).shape == (1, 10)


@pytest.mark.parametrize("spec", ["tiny:grey", "tiny:Holder.grey", "tiny:instance", "tiny:Net"])
def test_a_factory_of_the_current_directory(here, grey_png, spec):
    before = list(sys.path)
    loaded = load_model(spec)
    assert sys.path == before
    assert not loaded.model.training
    assert loaded.model(loaded.prepare(Image.open(grey_png))).shape == (1, 3)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("resnet", "unknown: expected one of digits, digits-vit, or package.module:factory"),
        ("hf:", "unknown"),
        ("nowhere:model", "No module named 'nowhere'"),
        ("tiny:absent", "no attribute 'absent'"),
        ("tiny:broken", "no such checkpoint"),
        ("tiny:number", "got int"),
        ("tiny:", "unknown"),
    ],
)
def test_what_is_no_model(here, spec, text):
    with pytest.raises(InputError, match=text):
        load_model(spec)


@pytest.mark.parametrize(
    ("spec", "package", "extra"),
    [
        ("hf:a/b", "transformers", "hf"),
        ("torchvision:resnet18", "torchvision", "torchvision"),
        ("timm:resnet18", "timm", "timm"),
    ],
)
def test_a_missing_package_names_its_extra(monkeypatch, spec, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "torchvision.models", raising=False)
    with pytest.raises(InputError, match=rf"not installed.*saliency-fast\[{extra}\]"):
        load_model(spec)


def test_a_broken_package_tells_why(here, monkeypatch):
    (here / "timm.py").write_text("raise RuntimeError('operator nms does not exist')")
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(here)
    with pytest.raises(InputError, match=r"does not import \(RuntimeError: operator nms"):
        load_model("timm:resnet18")


@pytest.fixture
def hugging_face(here):
    """A tiny ViT with its processor, saved as a folder."""
    usable("transformers.models.vit.modeling_vit")
    transformers = usable("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        id2label={0: "cat", 1: "dog", 2: "LABEL_2"},
    )
    transformers.ViTForImageClassification(config).save_pretrained(here / "vit")
    size = {"height": 32, "width": 32}
    transformers.ViTImageProcessor(size=size).save_pretrained(here / "vit")
    return here / "vit"


def test_hugging_face(hugging_face, colour_png, monkeypatch):
    loaded = load_model(f"hf:{hugging_face}")
    assert loaded.labels == {0: "cat", 1: "dog"}
    assert loaded.prepare(Image.open(colour_png)).shape == (1, 3, 32, 32)
    assert run("explain", colour_png, "--model", f"hf:{hugging_face}", *FAST) == 0
    assert sf.load("out/colour.integrated_gradients.safetensors").values.shape == (1, 3, 32, 32)
    assert run("verify", "out/colour.integrated_gradients.safetensors") == 0


def test_hugging_face_without_a_model(here):
    usable("transformers.models.vit.modeling_vit")
    (here / "empty").mkdir()
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(f"hf:{here / 'empty'}")


def test_torchvision(here, colour_png):
    models = usable("torchvision.models")
    save_file(models.get_model("squeezenet1_1", weights=None).state_dict(), "w.safetensors")
    options = ("--weights", "w.safetensors", "--method", "gradient")
    assert run("explain", colour_png, "--model", "torchvision:squeezenet1_1", *options) == 0
    assert sf.load("out/colour.gradient.safetensors").values.shape == (1, 3, 224, 224)
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model("torchvision:absent")


def test_timm(here, colour_png):
    timm = usable("timm")
    torch.save(timm.create_model("test_resnet", pretrained=False).state_dict(), "w.pt")
    options = ("--weights", "w.pt", "--method", "gradient")
    assert run("explain", colour_png, "--model", "timm:test_resnet", *options) == 0
    assert sf.load("out/colour.gradient.safetensors").values.shape == (1, 3, 160, 160)
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model("timm:absent")


def test_torchvision_is_called_as_documented(monkeypatch):
    """The same without torchvision: a stand-in with its functions."""
    weights = SimpleNamespace(
        transforms=lambda: lambda picture: torch.zeros(3, 7, 7), meta={"categories": ["cat"]}
    )
    models = SimpleNamespace(
        get_model_weights=lambda name: SimpleNamespace(DEFAULT=weights),
        get_model=lambda name, weights: nn.Conv2d(3, 1 if weights else 2, 1),
    )
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=models))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    loaded = load_model("torchvision:any")
    assert loaded.labels == {0: "cat"}
    assert loaded.model.out_channels == 1
    assert loaded.prepare(Image.new("L", (9, 9))).shape == (1, 3, 7, 7)


def _hub(hub, monkeypatch):
    """A model whose own processor takes 8-bit pictures, by each hub."""

    def pixels(picture):
        assert picture.mode == "RGB"
        return torch.from_numpy(np.array(picture)).movedim(2, 0).float()

    weights = SimpleNamespace(transforms=lambda: pixels, meta={})
    processor = SimpleNamespace(from_pretrained=lambda name: processed)

    def processed(images, return_tensors):
        return {"pixel_values": pixels(images)[None]}

    model = nn.Conv2d(3, 1, 1)
    model.config = SimpleNamespace(id2label={})
    made = SimpleNamespace(
        AutoModelForImageClassification=SimpleNamespace(from_pretrained=lambda name: model),
        AutoImageProcessor=processor,
        get_model_weights=lambda name: SimpleNamespace(DEFAULT=weights),
        get_model=lambda name, weights: model,
        create_model=lambda name, pretrained: model,
        resolve_model_data_config=lambda model: {"input_size": (3, 4, 4)},
        create_transform=lambda input_size, is_training: pixels,
    )
    monkeypatch.setattr("saliency_fast.cli.arguments._package", lambda *_: made)
    return load_model(f"{hub}:any")


@pytest.mark.parametrize("hub", ["hf", "torchvision", "timm"])
def test_sixteen_bits_are_not_cut_to_white(hub, here, monkeypatch):
    """Processors of models take 8 bits: they get the nearest levels, by every hub."""
    levels = (np.arange(12, dtype=np.uint16).reshape(3, 4) * 5500).astype(np.uint16)
    Image.fromarray(levels).save(here / "deep.png")
    with Image.open(here / "deep.png") as opened:
        found = _hub(hub, monkeypatch).prepare(opened)[0]
    assert torch.equal(found, torch.from_numpy(np.rint(levels / 257)).float().expand(3, 3, 4))


def test_weights_of_each_kind(here, tiny):
    model = tiny.Net()
    nn.init.constant_(model.head.bias, 7.0)
    save_file(model.state_dict(), "w.safetensors")
    torch.save(model.state_dict(), "w.pt")
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, "nested.pth")
    for name in ("w.safetensors", "w.pt", "nested.pth"):
        assert load_model("tiny:grey", name).model.head.bias.tolist() == [7.0] * 3


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


def test_weights_that_would_run_code_are_refused(here):
    torch.save({"head.bias": Harm()}, "w.pt")
    (here / "w.pkl").write_bytes(pickle.dumps(Harm()))
    for name in ("w.pt", "w.pkl"):
        with pytest.raises(InputError, match=r"hold more than tensors .* refused"):
            load_model("tiny:grey", name)
    assert not (here / "harmed").exists()


def test_weights_that_do_not_fit(here):
    save_file({"other": torch.ones(2)}, "w.safetensors")
    (here / "cut.safetensors").write_bytes(b"12")
    for name, text in (
        ("w.safetensors", r"do not fit the model: .*Missing key"),
        ("cut.safetensors", "cannot be read"),
        ("absent.pt", "is not a file"),
    ):
        with pytest.raises(InputError, match=text):
            load_model("tiny:grey", name)
    torch.save([1, 2], "list.pt")
    with pytest.raises(InputError, match="do not fit"):
        load_model("tiny:grey", "list.pt")
    with pytest.raises(InputError, match="needs a module"):
        load_model("tiny:plain", "w.safetensors")


def test_arrays_take_the_dtype_of_the_weights(here, monkeypatch):
    monkeypatch.setitem(zoo.MODELS, "double", lambda: nn.Linear(5, 3).double())
    np.save("row.npy", np.ones(5, dtype=np.float32))
    assert run("explain", "row.npy", "--model", "double", *FAST) == 0
    recorded = sf.load("out/row.integrated_gradients.safetensors")
    assert recorded.values.dtype == torch.float64


def test_an_unknown_device(here):
    with pytest.raises(InputError, match="--device 'abacus' cannot be used"):
        load_model("tiny:grey", device="abacus")
