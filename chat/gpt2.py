"""GPT-2: its weights in our GPT, its tokenizer with turn tokens and a pad behind it."""
from pathlib import Path

import tiktoken
import torch

from chat.tokenizer import Tokenizer
from gpt import GPT, GPTConfig
from lab.files import DataError

NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
URL = "https://huggingface.co/{}/resolve/main/pytorch_model.bin"


@torch.no_grad()
def from_state_dict(weights, head_size=64):
    """Our GPT from {name: tensor} in Hugging Face's naming; heads of 64 channels, as OpenAI's.

    Three tokens that are only read stand behind its vocabulary; its logits stay as they are. Raises
    KeyError or RuntimeError for a missing or odd tensor, ValueError for heads or a head untied."""
    w = {name.removeprefix("transformer."): x for name, x in weights.items()}
    words = w["wte.weight"]                                             # (V, C)
    (V, C), n_positions = words.shape, len(w["wpe.weight"])
    if C % head_size:
        raise ValueError(f"its width {C} is not divisible by the {head_size} channels of a head")
    if not torch.equal(w.get("lm_head.weight", words), words):
        raise ValueError("its lm_head.weight is not tied to wte.weight")
    n_layer = sum(name.endswith("ln_1.bias") for name in w)
    model = GPT(GPTConfig(V, n_positions, n_layer, C // head_size, C, read_only=3))
    state = model.state_dict()
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # Conv1D keeps (in, out)
    for name in state:
        if "_head" not in name and name != "wte.weight":
            state[name] = w[name].T if name.endswith(transposed) else w[name]
    new = state["wte.weight"][V:] + words.mean(0)  # the average token, and a little noise
    state["wte.weight"] = torch.cat((words, new))
    model.load_state_dict(state)
    return model


def tokenizer():
    """GPT-2's own, which tiktoken fetches once; its end of text is our end."""
    encoding = tiktoken.get_encoding("gpt2")
    ranks, pattern = encoding._mergeable_ranks, encoding._pat_str
    return Tokenizer(ranks, pattern, said=("end",), read=("pad", "user", "assistant"))


def load(init):
    """Tokenizer and model of a GPT-2 by its name, fetched once, or from a file."""
    local, url = Path(init).is_file(), URL.format(init)
    if not local and init not in NAMES:
        raise DataError(f"--init {init}: neither a file nor one of {', '.join(NAMES)}")
    problem = f"{init} cannot be read" if local else (
        f"nothing can be fetched here; where there is a network, fetch {url} and give its path")
    try:
        weights = torch.load(init, map_location="cpu", weights_only=True) if local else \
            torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True,
                                               file_name=f"{init}-pytorch_model.bin")
        model = from_state_dict(weights)
        problem = ("tiktoken's gpt2 encoding cannot be fetched here; where there is a network, "
                   "tiktoken.get_encoding('gpt2') leaves it in TIKTOKEN_CACHE_DIR: copy that")
        theirs = tokenizer()
    except OSError as e:
        raise DataError(f"--init {init}: {problem} ({type(e).__name__})") from None
    except Exception as e:
        raise DataError(f"--init {init}: damaged, or no GPT-2 in Hugging Face's naming "
                        f"({type(e).__name__}: {str(e)[:100]})") from None
    if model.config.vocab_size != theirs.vocab_size:
        raise DataError(f"--init {init}: it has {model.config.vocab_size} tokens, not GPT-2's")
    return theirs, model
