"""Models made on the spot: Llama with random weights, and a tokenizer of one token a byte. Seconds, and no download.

python -m examples.vllm.model mid out/vllm/mid
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Dict, Final

SHAPES: Final[Dict[str, Dict[str, int]]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1},
    "pair": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2},
    "mid": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
            "num_attention_heads": 8, "num_key_value_heads": 4},
}  # fmt: skip
"""``tiny``: 0.1 million weights, ``pair``: 0.5 (for two ranks), ``mid``: 25 (8 KiB of KV a token in bfloat16)."""


def make(shape: str, folder: Path, seed: int = 0) -> Path:
    """The folder of a model that ``vllm serve`` takes; made unless it is there."""
    if (folder / "done").exists():
        return folder
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words: Dict[str, int] = {letter: i for i, letter in enumerate(letters)}
    words["<s>"], words["</s>"] = 256, 257
    bare: Any = Tokenizer(models.BPE(vocab=words, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bare.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=258, max_position_embeddings=8192, tie_word_embeddings=False, initializer_range=0.1,
        bos_token_id=256, eos_token_id=257, **SHAPES[shape],
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    (folder / "done").touch()
    return folder


if __name__ == "__main__":
    print(make(sys.argv[1], Path(sys.argv[2])))
