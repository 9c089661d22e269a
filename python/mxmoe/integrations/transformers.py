"""The kernels inside Hugging Face transformers: gpt-oss on a CPU, in the memory of its checkpoint.

    import mxmoe.integrations.transformers as mxmoe_transformers
    from transformers import AutoModelForCausalLM

    mxmoe_transformers.register()
    model = AutoModelForCausalLM.from_pretrained(
        "openai/gpt-oss-20b",
        attn_implementation="mxmoe",
        quantization_config=mxmoe_transformers.MxmoeConfig(),
    )

`register` adds three things, each of which works without the others:

* ``attn_implementation="mxmoe"``: attention with sinks, grouped queries and sliding windows, on padded batches
  (left and right), with dynamic, static and sliding caches, in training without dropout, and under `torch.compile`.
  Models without sinks are computed as usual. Masks that are not causal, sliding or padding, attention weights as an
  output, dropout and head sizes above 256 are errors.
* ``experts_implementation="mxmoe"``: experts with bfloat16 weights, for checkpoints without MXFP4 and for training.
  Their values stay what they are: nothing is converted to MXFP4.
* ``quantization_config=MxmoeConfig()``: MXFP4 experts as stored, and the dense layers' products by the kernels. The
  router stays transformers' own, and with it ``output_router_logits`` and hooks; `save_pretrained` writes the stored
  tensors back.

transformers 5.0.0 to 5.23 is supported, and newer below 6; the name of the experts from 5.7 on, which is the first to
take names it does not know. Before 5.0 the router speaks another language.
"""

from __future__ import annotations

# First, so that a transformers that does not fit is named before anything of it is used.
from mxmoe.integrations._transformers import check_version

# isort: split
from transformers.integrations.moe import ExpertsInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from mxmoe.integrations._transformers.attention import attention
from mxmoe.integrations._transformers.experts import experts_forward
from mxmoe.integrations._transformers.masks import make_mask
from mxmoe.integrations._transformers.modules import Linear, Mxfp4Experts
from mxmoe.integrations._transformers.quantizer import MxmoeConfig, register_quantization

__all__ = ["Linear", "Mxfp4Experts", "MxmoeConfig", "register"]


def register() -> None:
    """Make the name ``mxmoe`` known to transformers; more calls change nothing.

    Raises
    ------
    ImportError
        transformers is not of a version that this works with.
    """
    check_version()
    AttentionInterface.register("mxmoe", attention)
    AttentionMaskInterface.register("mxmoe", make_mask)
    ExpertsInterface.register("mxmoe", experts_forward)
    register_quantization()
