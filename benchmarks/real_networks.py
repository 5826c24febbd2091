"""Networks written by others, with random weights: the table of `benchmarks.real_models`.

Small sizes of each family, which the extra `real-models` installs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import Workload, calibrate

CLASSES, TARGET = 7, 3


class Scores(nn.Module):
    """The scores [B, classes] of a network; those of a map of classes are averaged over it.

    keyword: by which the network takes its input, where not by position.
    """

    def __init__(self, network: nn.Module, keyword: str = "") -> None:
        super().__init__()
        self.network, self.keyword = network, keyword

    def forward(self, x: Tensor) -> Tensor:
        found = self.network(**{self.keyword: x}) if self.keyword else self.network(x)
        if not isinstance(found, Tensor):
            found = found["out"] if "out" in found else found[0]
        scores: Tensor = found if found.dim() == 2 else found.flatten(2).mean(2)
        return scores


@dataclass(frozen=True)
class Network:
    """How a network is built, and the shape of one input."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    keyword: str = ""

    def module(self) -> nn.Module:
        """In evaluation mode, with weights from a seed; no part of it is silent."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Scores(self.build(), self.keyword)
            for parameter in model.parameters():
                if parameter.dim() > 1 and not parameter.any():
                    nn.init.normal_(parameter, 0, 1 / math.sqrt(parameter[0].numel()))
            # Without it, signals vanish or explode on their way through a random network.
            calibrate(model, (2, *self.shape), torch.Generator().manual_seed(0))
        return model.eval()


def _torchvision(name: str, package: str = "", **options: Any) -> nn.Module:
    from torchvision import models

    library = getattr(models, package) if package else models
    model: nn.Module = getattr(library, name)(num_classes=CLASSES, **options)
    return model


def _timm(name: str, **options: Any) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)
    return model


def _transformers(name: str, **options: Any) -> nn.Module:
    """`name` is that of a class; layers, width and heads are small."""
    import transformers

    kind = getattr(transformers, name)
    small = {"num_labels": CLASSES, "pad_token_id": 0}
    model: nn.Module = kind(kind.config_class(**small | options))
    return model


def _monai(name: str, *arguments: Any, **options: Any) -> nn.Module:
    from monai.networks import nets

    model: nn.Module = getattr(nets, name)(*arguments, **options)
    return model


def _smp(name: str, encoder: str) -> nn.Module:
    import segmentation_models_pytorch as smp

    model: nn.Module = getattr(smp, name)(encoder, encoder_weights=None, classes=CLASSES)
    return model


def _picture(build: Callable[..., nn.Module], name: str, side: int, **options: Any) -> Network:
    return Network(partial(build, name, **options), (3, side, side))


def _text(name: str, width: int = 192, tokens: int = 48, **options: Any) -> Network:
    return Network(partial(_transformers, name, **options), (tokens, width), "inputs_embeds")


def _volume(name: str, *arguments: Any, side: int = 32, **options: Any) -> Network:
    return Network(partial(_monai, name, *arguments, **options), (1, side, side, side))


_BERT = {
    "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3,
    "intermediate_size": 768, "vocab_size": 1000,
}  # fmt: skip
_SEGMENTATION = {"package": "segmentation", "weights_backbone": None}
_STRIDES = {"channels": (16, 32, 64), "strides": (2, 2)}
NETWORKS: dict[str, Network] = {
    **{
        f"torchvision {name}": _picture(_torchvision, name, side, **options)
        for name, side, options in (
            ("alexnet", 112, {}),
            ("convnext_tiny", 64, {}),
            ("densenet121", 96, {}),
            ("efficientnet_b0", 112, {}),
            ("googlenet", 112, {"init_weights": False, "aux_logits": False}),
            ("mobilenet_v2", 112, {}),
            ("mobilenet_v3_small", 112, {}),
            ("regnet_y_400mf", 112, {}),
            ("resnet18", 112, {}),
            ("resnet50", 112, {}),
            ("shufflenet_v2_x0_5", 112, {}),
            ("squeezenet1_1", 112, {}),
            ("swin_t", 112, {}),
            ("vgg11_bn", 64, {}),
            ("lraspp_mobilenet_v3_large", 112, _SEGMENTATION),
        )
    },
    "torchvision r3d_18": Network(partial(_torchvision, "r3d_18", "video"), (3, 8, 48, 48)),
    **{
        f"timm {name}": _picture(_timm, name, side, **options)
        for name, side, options in (
            ("coat_lite_tiny", 112, {"img_size": 112}),
            ("convnext_atto", 112, {}),
            ("dla34", 96, {}),
            ("eca_nfnet_l0", 96, {}),
            ("edgenext_xx_small", 128, {}),
            ("eva02_tiny_patch14_224", 224, {}),
            ("fastvit_t8", 128, {}),
            ("gcresnext26ts", 128, {}),
            ("ghostnet_050", 112, {}),
            ("hgnetv2_b0", 112, {}),
            ("lambda_resnet26t", 128, {"img_size": 128}),
            ("levit_128s", 224, {}),
            ("mixer_s16_224", 224, {}),
            ("mobilevit_xxs", 128, {}),
            ("poolformer_s12", 112, {}),
            ("repvgg_a0", 112, {}),
            ("resnest14d", 112, {}),
            ("tiny_vit_5m_224", 224, {}),
            ("vit_tiny_patch16_224", 224, {}),
            ("xcit_nano_12_p16_224", 224, {}),
        )
    },
    "transformers albert": _text("AlbertForSequenceClassification", embedding_size=192, **_BERT),
    "transformers bert": _text("BertForSequenceClassification", **_BERT),
    "transformers deberta_v2": _text(
        "DebertaV2ForSequenceClassification",
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        **_BERT,
    ),
    "transformers distilbert": _text(
        "DistilBertForSequenceClassification",
        dim=192,
        n_layers=4,
        n_heads=3,
        hidden_dim=768,
        vocab_size=1000,
    ),
    "transformers gpt2": _text(
        "GPT2ForSequenceClassification", n_embd=192, n_layer=4, n_head=3, vocab_size=1000
    ),
    "transformers llama": _text("LlamaForSequenceClassification", num_key_value_heads=3, **_BERT),
    "transformers opt": _text(
        "OPTForSequenceClassification", ffn_dim=768, word_embed_proj_dim=192, **_BERT
    ),
    "transformers segformer": Network(
        partial(_transformers, "SegformerForImageClassification"), (3, 128, 128), "pixel_values"
    ),
    "transformers swinv2": Network(
        partial(
            _transformers,
            "Swinv2ForImageClassification",
            image_size=112,
            embed_dim=48,
            depths=[2, 2, 2, 2],
            num_heads=[2, 4, 8, 16],
        ),
        (3, 112, 112),
        "pixel_values",
    ),
    "transformers wav2vec2": Network(
        partial(_transformers, "Wav2Vec2ForSequenceClassification", conv_dim=(64,) * 7, **_BERT),
        (8000,),
        "input_values",
    ),
    "monai attention_unet": _volume("AttentionUnet", 3, 1, 4, **_STRIDES),
    "monai basic_unet": _volume("BasicUNet", 3, 1, 4, (8, 8, 16, 32, 64, 8)),
    "monai densenet121": _volume("DenseNet121", 3, 1, CLASSES),
    "monai dynunet": _volume(
        "DynUNet", 3, 1, 4, [3, 3, 3], [1, 2, 2], [2, 2], filters=[16, 32, 64]
    ),
    "monai segresnet": _volume("SegResNet", 3, out_channels=4, init_filters=8),
    "monai unet": _volume("UNet", 3, 1, 4, num_res_units=2, **_STRIDES),
    "monai unetr": _volume(
        "UNETR", 1, 4, (32, 32, 32), 8, hidden_size=192, mlp_dim=384, num_heads=3
    ),
    "monai vnet": _volume("VNet", 3, 1, 4, side=16),
    **{
        f"smp {name} {encoder}": _picture(_smp, name, 96, encoder=encoder)
        for name, encoder in (
            ("DeepLabV3Plus", "resnet18"),
            ("FPN", "mobilenet_v2"),
            ("PSPNet", "resnet18"),
            ("Segformer", "mit_b0"),
            ("Unet", "resnet18"),
            ("UnetPlusPlus", "mobilenet_v2"),
        )
    },
}


def sized(name: str, side: int | None = None) -> Workload:
    """A network by name as the benchmarks take it."""
    found = NETWORKS[name]
    return Workload(name, found.module, found.shape, TARGET)
