"""Options of a transformer's blocks and of its loss, as flags and configurations name them."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from models.config import ACTIVATIONS, NORMS
from utils.errors import UsageError
from utils.options import Options, flag_name, option
from utils.resume import APPLIES, FIXED


@dataclass(frozen=True)
class BlockOptions(Options, title="blocks"):
    """What a transformer block is made of."""

    sandwich_norm: bool = option(False, "a second LayerNorm after each sub-layer", resume=FIXED)
    norm: str = option("layer", "norms: LayerNorm, or RMSNorm", choices=NORMS, resume=FIXED)
    qk_norm: bool = option(False, "RMS-normalise queries and keys of each head", resume=FIXED)
    rotary_2d: bool = option(False, "rotary positions of queries and keys, by row and column", resume=FIXED)
    shift_tokens: bool = option(False, "half of a text token's channels come from the token before, a quarter of a "
                                       "code's each from those above and to the left", resume=FIXED)
    value_residual: bool = option(False, "mix each layer's values with the first layer's, by a learned share",
                                  resume=FIXED)
    activation: str | None = option(None, "of the feed-forward layers; geglu and swiglu are gated", none="geglu",
                                    choices=ACTIVATIONS, resume=FIXED)
    ff_mult: int = option(4, "hidden width of the feed-forward layers as a multiple of --hidden-size; with 6, one that "
                             "is not gated has as many weights as a gated one with 4", ge=1, resume=FIXED)
    base_width: float = option(0.0, "the --hidden-size at which --learning-rate and --init-std were tuned: at another "
                                    "one both are scaled to fit; 0: they are taken as they are", ge=0, le=1e6,
                                    resume=FIXED)
    layer_scale: bool = option(True, "a learned factor for each channel of each residual branch (mini-dalle only)",
                               resume=FIXED)


@dataclass(frozen=True)
class LossOptions(BlockOptions, title="loss"):
    """What a model learns, and from what."""

    loss_img_weight: float = option(7.0, "weight of the image loss relative to the text loss", ge=0, le=1e6,
                                    resume=APPLIES)
    code_noise: float = option(0.0, "share of the input codes replaced by random ones in training", ge=0, lt=1,
                               resume=APPLIES)
    code_noise_per_image: bool = option(False, "each image has its own share of wrong codes, from 0 to twice "
                                               "--code-noise", resume=APPLIES)
    code_noise_similar: float = option(0.0, "share of the images some of whose input codes are those of a similar "
                                            "image in training", ge=0, le=1, resume=APPLIES)
    soft_codes: float = option(0.0, "input codes and targets in training are those that the VQGAN decodes alike, with "
                                    "probabilities of this temperature; 1: the squared distance of a code to the next",
                               ge=0, resume=APPLIES)
    soft_codes_fade: float = option(0.0, "share of the training, at its end, in which soft targets turn into the exact "
                                         "codes; input codes stay soft", ge=0, le=1, resume=APPLIES)
    init_codes: str = option("random", "initial vectors of codes in embedding and head; codebook: a random projection "
                                       "of the VQGAN's codebook, so that similar codes start alike",
                             choices=("random", "codebook"), resume=FIXED)
    null_cond_prob: float = option(0.0, "share of captions dropped in training, for classifier-free guidance", ge=0,
                                   le=1, resume=APPLIES)
    z_loss: float = option(0.0, "weight of the squared logarithm of the sum of exponentiated logits in the loss, which "
                                "keeps logits small", ge=0, le=1e6, resume=APPLIES)
    label_smoothing: float = option(0.0, "share of each code's target that is spread evenly over all codes, so that "
                                         "the model is never too sure of one", ge=0, lt=1, resume=APPLIES)


def check_architecture(model: Any) -> None:
    """Refuse options that an architecture decides, and those that minDALL-E's layout cannot store."""
    published = ("norm", "qk_norm", "rotary_2d", "shift_tokens", "value_residual", "activation", "ff_mult")
    decided = {"mini-dalle": (), "image-gpt": ("activation",), "mindalle": published}
    for name in decided[model.architecture]:
        if getattr(model, name) != getattr(BlockOptions, name):
            raise UsageError(f"{flag_name(name)}: --architecture {model.architecture} has its own; omit it")
    if model.architecture != "mindalle":
        return
    if model.sandwich_norm:
        raise UsageError("--sandwich-norm: --architecture mindalle has one LayerNorm for each branch; omit it")
    if set(model.attn_types) != {"full"}:
        raise UsageError("--attn-types: every layer of --architecture mindalle has full attention; give full")
    if model.num_attention_heads * model.dim_head != model.hidden_size:
        raise UsageError(f"--dim-head {model.dim_head}: the heads of --architecture mindalle split its width, so "
                         f"--num-attention-heads x --dim-head must be --hidden-size {model.hidden_size}")
