"""Write a trained tiny model as a checkpoint in the Hugging Face layout, and check what was written.

The experts become MXFP4 blocks and scales, everything else bf16: the very values the training's forward pass used.
The check reads the files back, compares every weight with those values bit for bit, then lets transformers'
``GptOssForCausalLM`` answer the held-out problems greedily from the decoded weights::

    python training/export_tiny.py --run RUN --out python/mxmoe/tiny --problems 30
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fake_quant import E2M1_VALUES, mxfp4_pack, mxfp4_round
from network import TinyConfig, TinyModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM

from mxmoe.harmony import Message, parse, render_conversation, stop_token_ids
from mxmoe.tiny.problems import TASKS, Problem, check, eval_problems
from mxmoe.tokenizer import Tokenizer

EXPERTS = ("gate_up_proj", "down_proj")


def interleave(gate_up: Tensor) -> Tensor:
    """Turn gate rows followed by linear rows, ``(experts, 2I, ...)``, into alternating ones."""
    gate, linear = gate_up.chunk(2, 1)
    return torch.stack((gate, linear), 2).flatten(1, 2)


def published_tensors(model: TinyModel) -> dict[str, Tensor]:
    """Return the checkpoint's tensors under their published names."""
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        kind = name.rsplit(".", 1)[-1]
        if "gate_up_proj" in kind:
            value = interleave(value)
        if kind in EXPERTS:
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = mxfp4_pack(value)
        else:
            tensors[name] = value.to(torch.bfloat16).contiguous()
    return tensors


def published_config(config: TinyConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return ``config.json`` with the key names of the published models."""
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.special("<|startoftext|>"),
        "eos_token_id": tokenizer.special("<|return|>"),
        "experts_per_token": config.num_experts_per_tok,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initial_context_length": config.original_max_position_embeddings,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "layer_types": [
            "full_attention" if config.window(i) is None else "sliding_attention"
            for i in range(config.num_hidden_layers)
        ],
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": "gpt_oss",
        "num_attention_heads": config.num_attention_heads,
        "num_experts_per_tok": config.num_experts_per_tok,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "num_local_experts": config.num_local_experts,
        "output_router_logits": False,
        "pad_token_id": tokenizer.special("<|endoftext|>"),
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": {
            "beta_fast": config.beta_fast,
            "beta_slow": config.beta_slow,
            "factor": config.rope_factor,
            "original_max_position_embeddings": config.original_max_position_embeddings,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": config.rope_theta,
        "router_aux_loss_coef": 0.01,
        "sliding_window": config.sliding_window,
        "swiglu_limit": config.swiglu_limit,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def export(run: Path, out: Path) -> TinyModel:
    """Write the checkpoint of a training run and return the model."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(run / "tokenizer.json", out / "tokenizer.json")
    tokenizer = Tokenizer.from_file(out / "tokenizer.json")
    model = TinyModel(TinyConfig(vocab_size=tokenizer.vocab_size))
    model.load_state_dict(torch.load(run / "training.pt")["model"])
    save_file(published_tensors(model), out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    config = published_config(model.config, tokenizer)
    generation = {
        "bos_token_id": config["bos_token_id"],
        "do_sample": True,
        "eos_token_id": [tokenizer.special(name) for name in ("<|return|>", "<|endoftext|>", "<|call|>")],
        "pad_token_id": config["pad_token_id"],
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    return model


def decode(blocks: Tensor, scales: Tensor) -> Tensor:
    """Decode MXFP4 from the format's definition; float32 ``(..., K)``."""
    table = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)])
    codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)
    return (table[codes.int()] * torch.exp2(scales.float() - 127)[..., None]).flatten(-2)


def read_back(out: Path, model: TinyModel) -> dict[str, Tensor]:
    """Read the checkpoint as transformers' float32 weights; raise if a value is not the one trained with."""
    tensors = load_file(out / "model.safetensors")
    state: dict[str, Tensor] = {}
    trained = model.state_dict()
    for name, value in trained.items():
        kind = name.rsplit(".", 1)[-1]
        if kind in EXPERTS:
            read = decode(tensors[f"{name}_blocks"], tensors[f"{name}_scales"])
            used = mxfp4_round(value).to(torch.bfloat16).float()
        else:
            read, used = tensors[name].float(), value.to(torch.bfloat16).float()
        used = interleave(used) if "gate_up_proj" in kind else used
        if not torch.equal(read, used):
            raise RuntimeError(f"{name}: the file holds other values than the training used")
        state[name] = read.mT.contiguous() if kind in EXPERTS else read
    return state


def as_transformers(out: Path, state: dict[str, Tensor]) -> GptOssForCausalLM:
    """Build transformers' model in float32 from decoded weights."""
    data = json.loads((out / "config.json").read_text())
    data.pop("quantization_config")
    model = GptOssForCausalLM(GptOssConfig(**data, attn_implementation="eager"))
    model.load_state_dict(state)
    return model.float().eval()


@torch.no_grad()
def complete(
    model: GptOssForCausalLM, prompts: Sequence[list[int]], stops: Sequence[int], pad: int
) -> list[list[int]]:
    """Continue prompts greedily, all at once, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=224, do_sample=False, eos_token_id=list(stops), pad_token_id=pad
    )
    written = []
    for row in out[:, width:].tolist():
        end = next((i for i, token in enumerate(row) if token in stops), len(row))
        written.append(row[: end + 1])
    return written


def answer_all(model: GptOssForCausalLM, tokenizer: Tokenizer, problems: Sequence[Problem]) -> list[bool]:
    """Let the model answer problems, giving it the functions' results, and judge the answers."""
    stops, pad = stop_token_ids(tokenizer), tokenizer.special("<|endoftext|>")
    talks = [problem.messages() for problem in problems]
    calls: list[list[tuple[str, str]]] = [[] for _ in problems]
    finals = [""] * len(problems)
    waiting = list(range(len(problems)))
    for _ in range(2):
        prompts = [render_conversation(talks[i], tokenizer) for i in waiting]
        written = complete(model, prompts, stops, pad) if prompts else []
        called = []
        for i, token_ids in zip(waiting, written, strict=True):
            messages: list[Message] = list(parse(token_ids, tokenizer))
            talks[i] += messages
            finals[i] = "".join(m.content for m in messages if m.channel == "final")
            asked = [(m.recipient, m.content) for m in messages if m.recipient]
            calls[i] += asked
            if asked and problems[i].call is not None:
                talks[i].append(problems[i].tool_message())
                called.append(i)
        waiting = called
    return [check(p, final, call) for p, final, call in zip(problems, finals, calls, strict=True)]


def main() -> None:
    """Export, check, and print the accuracy of each task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of train_tiny.py")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--problems", type=int, default=30, help="held-out problems a task; 0 skips them")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = export(args.run, args.out)
    network = as_transformers(args.out, read_back(args.out, model)).to(getattr(torch, args.dtype))
    tokenizer = Tokenizer.from_file(args.out / "tokenizer.json")
    size = sum(path.stat().st_size for path in args.out.iterdir() if path.is_file())
    print(f"{args.out}: {size} bytes, every weight as trained")
    if not args.problems:
        return
    problems = eval_problems(args.problems)
    shares = []
    for task in TASKS:
        chosen = [problem for problem in problems if problem.task == task]
        right = answer_all(network, tokenizer, chosen)
        shares.append(sum(right) / len(right))
        print(f"{task:14} {sum(right)}/{len(right)}", flush=True)
    print(f"accuracy {sum(shares) / len(shares):.4f}")


if __name__ == "__main__":
    main()
