"""Fine-tune a mixture of experts with TRL's SFTTrainer and PEFT: LoRA on attention and on the MXFP4 experts.

    python examples/finetune/sft.py                                                # the demo model, on a CPU, a minute
    python examples/finetune/sft.py --model Qwen/Qwen3-30B-A3B --text my.txt --steps 200 --length 2048 --out adapter

The demo model's tokens are bytes; it learns to write in capitals. Any other model trains in bf16 on a GPU, its adapters
in bf16, too; TRL makes a few logits at a time. Prints the held-out loss before and after, saves the adapter, and checks
that it gives the same logits when it is read back.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

import mxfp4_compile
from mxfp4_compile.tools.demo import MODEL_DIRECTORY, TEXT_FILE

ATTENTION, EXPERTS = ["q_proj", "k_proj", "v_proj", "o_proj"], ["experts.gate_up_proj", "experts.down_proj"]


def token_ids(args: argparse.Namespace) -> list[int]:
    """Of the whole text."""
    if args.model == str(MODEL_DIRECTORY):
        return list((MODEL_DIRECTORY / TEXT_FILE).read_bytes().upper())
    return list(AutoTokenizer.from_pretrained(args.model)(args.text.read_text(encoding="utf-8"))["input_ids"])


def main() -> None:  # load, train, save, read back
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=str(MODEL_DIRECTORY), help="a name or directory; experts are named as Qwen3's"
    )
    parser.add_argument("--text", type=Path, help="what a model other than the demo's is trained on")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--length", type=int, default=64, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=4, help="rows of a step")
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--out", help="a directory for the adapter; by default a temporary one")
    args = parser.parse_args()
    gpu = args.model != str(MODEL_DIRECTORY)
    options = {"dtype": torch.bfloat16, "device_map": "cuda"} if gpu else {"dtype": torch.float32}
    load = lambda: mxfp4_compile.load(args.model, progress=False, **options)
    ids = token_ids(args)
    rows = [ids[i : i + args.length] for i in range(0, len(ids) - args.length, args.length)]
    train, held_out = (Dataset.from_dict({"input_ids": part}) for part in (rows[:-16], rows[-16:]))

    lora = LoraConfig(r=8, lora_alpha=16, target_modules=ATTENTION, target_parameters=EXPERTS)
    model = get_peft_model(load(), lora, autocast_adapter_dtype=False)
    with tempfile.TemporaryDirectory() as temporary:
        settings = SFTConfig(
            output_dir=args.out or temporary, max_steps=args.steps, per_device_train_batch_size=args.batch,
            learning_rate=args.rate, lr_scheduler_type="constant", max_length=args.length, bf16=gpu,
            gradient_checkpointing=True, use_cpu=not gpu, save_strategy="no", logging_steps=5, report_to="none",
        )  # fmt: skip
        trainer = SFTTrainer(model=model, args=settings, train_dataset=train, eval_dataset=held_out)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
        trainer.save_model()
        probe = torch.tensor(rows[-1:], device=model.device)
        with torch.no_grad():
            mine = model.eval()(input_ids=probe).logits
            again = PeftModel.from_pretrained(load(), settings.output_dir, autocast_adapter_dtype=False)
            same = torch.equal(again(input_ids=probe).logits, mine)
    print(f"held-out loss {before:.3f} -> {after:.3f}; the adapter read back gives the same logits: {same}")
    if not same or after > before - (0 if gpu else 1.0):
        raise SystemExit("the loss did not fall (the demo's by 1), or the adapter read back computes something else")


if __name__ == "__main__":
    main()
