"""Teach the tiny model a new manner: LoRA by PEFT, on experts that stay packed in MXFP4.

    python examples/lora_tiny.py [FOLDER FOR THE ADAPTER]

The adapter stands on attention's projections and on what goes into the experts. The model learns from sums to begin
its answers with "Ahoy!"; then mxmoe loads the saved adapter, without PyTorch, and answers sums that it has not seen.
"""

from __future__ import annotations

import hashlib
import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import mxmoe
import mxmoe.integrations.transformers as mxmoe_transformers
from mxmoe.chat import reply
from mxmoe.harmony import Message, render_conversation
from mxmoe.integrations.peft import with_experts
from mxmoe.tiny.problems import Problem, make_problem

TINY = Path(mxmoe.__file__).parent / "tiny"
STEPS, BATCH = 40, 4
IGNORED = -100  # what transformers' loss passes over


def example(problem: Problem, tokenizer: mxmoe.Tokenizer) -> tuple[list[int], list[int]]:
    """Write a problem and its answer in the new manner; return tokens, and labels for the assistant's part alone."""
    problem = replace(problem, history=(), instructions=None, functions=())  # the question alone
    *thought, final = problem.worked()
    answer = Message("assistant", f"Ahoy! {final.content}", channel="final")
    prompt = render_conversation(problem.messages(), tokenizer)
    messages = [*problem.messages(), *thought, answer]
    ids = render_conversation(messages, tokenizer, next_role=None, drop_analysis=False, end_with_return=True)
    return ids, [IGNORED] * len(prompt) + ids[len(prompt) :]


def batch_of(examples: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """Pad some examples on the right."""
    longest = max(len(ids) for ids, _ in examples)
    rows = [(ids + [0] * (longest - len(ids)), labels + [IGNORED] * (longest - len(ids))) for ids, labels in examples]
    mask = [[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in examples]
    ids, labels = zip(*rows, strict=True)
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "attention_mask": torch.tensor(mask)}


def fingerprint(model: torch.nn.Module) -> str:
    """Hash the bytes of all packed weights."""
    packed = [p for name, p in model.named_parameters() if name.endswith(("_blocks", "_scales"))]
    assert packed
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in packed)).hexdigest()


def train(folder: Path) -> None:
    """Fine-tune, and save the adapter."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # for work as small as this, threads cost more than they give
    mxmoe_transformers.register()
    base = AutoModelForCausalLM.from_pretrained(
        TINY, attn_implementation="mxmoe", quantization_config=mxmoe_transformers.MxmoeConfig(), dtype=torch.float32
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "experts"]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(base, with_experts(config))
    model.print_trainable_parameters()

    tokenizer = mxmoe.Tokenizer.from_file(TINY / "tokenizer.json")
    rng = random.Random(0)
    data = [example(make_problem("add", rng, "train"), tokenizer) for _ in range(STEPS * BATCH)]
    before = fingerprint(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for step in range(STEPS):
        loss = model(**batch_of(data[step * BATCH : (step + 1) * BATCH])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == STEPS - 1:
            print(f"step {step:2}: loss {loss.item():.3f}")
    print(f"the experts' weights are {'unchanged' if fingerprint(model) == before else 'CHANGED'}, byte for byte")
    model.save_pretrained(str(folder))


def main() -> None:
    """Train, then ask both models."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else scratch)
        train(folder)
        plain, adapted = mxmoe.load("tiny"), mxmoe.load("tiny", adapter=folder)
        print(f"the adapter takes {adapted.components['adapter']['bytes']} bytes beside the model")
        for effort, question in (("low", "What is 17 + 25?"), ("medium", "How much is 48 plus 31?")):
            messages = [mxmoe.harmony.system_message(effort, "2026-01-01"), Message("user", question)]
            answers = [reply(model, messages, 200, temperature=0.0).text for model in (plain, adapted)]
            print(f"{question}  without: {answers[0]!r}  with: {answers[1]!r}")


if __name__ == "__main__":
    main()
