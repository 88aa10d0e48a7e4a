"""One trial as a competent user of TRL writes it: the reference of `loop.py`. Knows nothing of ftexp.

    python trl_trial.py MODEL ROWS.jsonl POINT FOLDER [tuned]

POINT is JSON with r, alpha, lr, neftune, steps, batch, every and own_template (the tokenizer's, in place of one without
a system prompt). Trains the rows of split `train`, scores the loss of split `valid` with the Trainer each `every` steps
and at the end, writes a completion for each valid prompt in one batch with the tuned and the base model, and saves the
adapter. `tuned` takes what a user who read the manuals sets: bfloat16
weights where the CPU multiplies them, eager attention, no gradient checkpointing.
"""

import time

BEGAN = time.monotonic()

import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Clock(TrainerCallback):
    """Seconds of each evaluation, to tell them from those of the steps."""

    def __init__(self):
        self.evaluations, self.last = [], time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        self.last = time.monotonic()

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluations.append(time.monotonic() - self.last)


def written(model, tokenizer, prompts):
    """Complete prompts greedily, all in one batch."""
    model.eval()
    tokenizer.padding_side = "left"
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
        for p in prompts
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.no_grad():
        out = model.generate(**batch, max_new_tokens=31, do_sample=False)
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def main():
    path, rows, point, folder = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), Path(sys.argv[4])
    tuned = sys.argv[5:] == ["tuned"]
    half = tuned and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16 if half else torch.float32, **({"attn_implementation": "eager"} if tuned else {})
    )
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = tokenizer.chat_template if point["own_template"] else CHAT
    told = [json.loads(line) for line in Path(rows).read_text().splitlines()]
    sets = {
        split: Dataset.from_list([
            {"prompt": [{"role": "user", "content": r["prompt"]}],
             "completion": [{"role": "assistant", "content": r["completion"]}]}
            for r in told if r["split"] == split
        ])
        for split in ("train", "valid")
    }  # fmt: skip
    prompts = [r["prompt"] for r in told if r["split"] == "valid"]
    loaded = time.monotonic()
    before = written(model, tokenizer, prompts)
    asked = time.monotonic()
    settings = SFTConfig(
        str(folder), max_steps=point["steps"], learning_rate=point["lr"], per_device_train_batch_size=point["batch"],
        per_device_eval_batch_size=48, neftune_noise_alpha=point["neftune"] or None, eval_strategy="steps",
        eval_steps=point["every"], save_strategy="no", logging_steps=1, report_to="none", use_cpu=True,
        bf16=False, seed=0, disable_tqdm=True, **({"gradient_checkpointing": False} if tuned else {}),
    )  # fmt: skip
    lora = LoraConfig(
        r=point["r"], lora_alpha=point["alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
    )  # fmt: skip
    clock = Clock()
    trainer = SFTTrainer(
        model, settings, train_dataset=sets["train"], eval_dataset=sets["valid"], processing_class=tokenizer,
        peft_config=lora, callbacks=[clock],
    )  # fmt: skip
    made = time.monotonic()
    trainer.train()
    trained = time.monotonic()
    after = written(trainer.model, tokenizer, prompts)
    loss = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    trainer.save_model(str(folder))
    evaluated = sum(clock.evaluations)
    seconds = {"load": loaded - BEGAN, "base": asked - loaded, "make": made - asked,
               "steps": trained - made - evaluated, "rungs": evaluated, "after": time.monotonic() - trained}  # fmt: skip
    kept = {"loss": loss, "dtype": str(model.dtype), "seconds": seconds, "before": before, "after": after}
    (folder / "result.json").write_text(json.dumps(kept))


if __name__ == "__main__":
    main()
