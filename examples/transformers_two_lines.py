"""gpt-oss in Hugging Face transformers, on mxmoe's kernels: two lines more than without.

    python examples/transformers_two_lines.py [FOLDER OR NAME ON THE HUB]

Without an argument it runs the small model that comes with the package.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM

import mxmoe
import mxmoe.integrations.transformers as mxmoe_transformers
from mxmoe.checkpoint import resolve
from mxmoe.harmony import Message, render_conversation, stop_token_ids, system_message

QUESTION = "What is 17 + 25?"


def main() -> None:
    """Load, ask, and print what the model writes and what its experts take."""
    path = resolve(sys.argv[1] if len(sys.argv) > 1 else "tiny")

    mxmoe_transformers.register()
    kernels = {"attn_implementation": "mxmoe", "quantization_config": mxmoe_transformers.MxmoeConfig()}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **kernels)

    tokenizer = mxmoe.Tokenizer.from_file(path / "tokenizer.json")
    prompt = render_conversation([system_message("low", "2026-01-01"), Message("user", QUESTION)], tokenizer)
    stops = list(stop_token_ids(tokenizer))
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=200, do_sample=False, eos_token_id=stops)
    print(QUESTION, tokenizer.decode(ids[0, len(prompt) :].tolist()))

    held = sum(p.nbytes for name, p in model.named_parameters() if name.endswith(("_blocks", "_scales")))
    c = model.config
    values = 3 * c.num_hidden_layers * c.num_local_experts * c.intermediate_size * c.hidden_size
    bits = 8 * held / values
    print(f"experts: {held / 1e6:.2f} MB of MXFP4, {bits:.2f} bits a weight; {2 * values / 1e6:.2f} MB in bfloat16")


if __name__ == "__main__":
    main()
