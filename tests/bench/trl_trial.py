"""One trial as a competent user of TRL writes it: the reference of `loop.py`. Knows nothing of ftexp.

    python trl_trial.py MODEL ROWS.jsonl RANK FOLDER [tuned]

Trains the rows of split `train` for 20 steps of 8, scores the loss of split `valid` with the Trainer at steps 10 and
20, writes a completion for each valid prompt in batches with the tuned and the base model, and saves the adapter.
`tuned` takes what a user who read the manuals sets: bfloat16 weights where the CPU multiplies them, eager attention,
no gradient checkpointing.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def written(model, tokenizer, prompts):
    """Complete prompts greedily, 48 at a time."""
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
    path, rows, rank, folder = sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
    tuned = sys.argv[5:] == ["tuned"]
    half = tuned and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16 if half else torch.float32, **({"attn_implementation": "eager"} if tuned else {})
    )
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = CHAT
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
    before = written(model, tokenizer, prompts)
    settings = SFTConfig(
        str(folder), max_steps=20, learning_rate=2e-3, per_device_train_batch_size=8, per_device_eval_batch_size=48,
        eval_strategy="steps", eval_steps=10, save_strategy="no", logging_steps=1, report_to="none", use_cpu=True,
        bf16=False, seed=0, disable_tqdm=True, **({"gradient_checkpointing": False} if tuned else {}),
    )  # fmt: skip
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model, settings, train_dataset=sets["train"], eval_dataset=sets["valid"], processing_class=tokenizer,
        peft_config=lora,
    )  # fmt: skip
    trainer.train()
    after = written(trainer.model, tokenizer, prompts)
    loss = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    trainer.save_model(str(folder))
    (folder / "result.json").write_text(json.dumps({"loss": loss, "before": before, "after": after}))


if __name__ == "__main__":
    main()
