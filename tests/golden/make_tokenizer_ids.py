"""Writes tokenizers.json: small vocabularies, and the ids and texts that transformers makes with them.

It runs outside the project's environment, in one of its own:

  python -m venv golden-env
  golden-env/bin/pip install transformers==5.24.0 tokenizers==0.23.3 sentencepiece==0.2.3 protobuf
  PYTHONPATH=. golden-env/bin/python tests/golden/make_tokenizer_ids.py

It takes some seconds. The vocabularies are trained on `CORPUS` without any cut, so that their pieces lie across the
cuts of every pre-tokenizer and ids tell one from another. What the file holds:

  byte_level     tokens, merges: of a vocabulary of bytes
  sentencepiece  model: the bytes of a tokenizer.model, in base64
  ids            name of a case, text -> ids without what a post-processor adds
  decoded        name of a case, text -> what these ids decode to
  opening        name of a case -> the ids of an empty text
  defaults       architecture -> the defaults of its configuration class
  versions       the libraries that computed all this

A case is `gguf/PRE` (a GGUF file with this pre-tokenizer), `gguf/llama` and so on (a GGUF file with the SentencePiece
vocabulary, of this architecture), or `directory/CLASS` (a directory that this tokenizer class wrote or read).
"""

from __future__ import annotations

import base64
import io
import json
import pathlib
import tempfile

import sentencepiece
import tokenizers
import transformers
from tokenizers import models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer

HERE = pathlib.Path(__file__).parent
CORPUS = (
    "The HelloWorld of it's 1234567 and 12, they'LL say WE'VE 3.14!\n\n  x = [a, b]\r\n\tdef naïve(Ünï): "
    "re\u0301sume\u0301 東京は今日 привет мир...  end\n"
)
BYTE_LEVEL_TEXTS = [
    CORPUS,
    "I'LL  say they've 20260 things.\n\nHello World",
    "naïve re\u0301sume\u0301 ÜnïHello it'S",
    "  leading and trailing  ",
    "The\t\tHello\r\n\r\nWorld!!!\n",
    "the<|end|>\nthe<think> the",
    "zq 345",
]
SENTENCES = [
    "Hi",
    " Hi",
    "  Hi",
    "<s>Hi",
    "<s> Hi",
    "[INST] Hi [/INST]",
    "[INST]Hi[/INST] there",
    "Hi</s>there  end",
    "Hi <s>there",
    "é東\n\nHi",
]
PHI_TEXTS = ["<|user|>\nHi<|end|>\n<|assistant|>\n", "<s> Hi", "Hi <|end|> there", "Hi</s>\nthere"]
SPECIALS = ["<|endoftext|>", "<|end|>"]
SP_SPECIALS = ["[INST]", "[/INST]", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]
PLAIN = ("<unk>", "<s>", "<|endoftext|>")  # of Phi-3's special tokens those without rstrip


def train_byte_level() -> tuple[list[str], list[str]]:
    built = tokenizers.Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=370, min_frequency=1, initial_alphabet=alphabet, show_progress=False, max_token_length=4
    )
    built.train_from_iterator([CORPUS, normalizers.NFC().normalize_str(CORPUS)], trainer)
    model = json.loads(built.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    # "zq" is a word that no merge makes; "<think>" is a token of the user's own.
    return [*tokens, "zq", *SPECIALS, "<think>"], [" ".join(merge) for merge in model["merges"]]


def train_sentencepiece() -> bytes:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([CORPUS.replace("\n", " "), "Hi there INST user assistant end"] * 4),
        model_writer=written,
        model_type="bpe",
        vocab_size=360,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return written.getvalue()


def of_gguf(architecture: str, **fields) -> transformers.PreTrainedTokenizerFast:
    """Builds what transformers makes of a GGUF file's metadata; reading the file itself would need torch."""
    names = GGUF_TOKENIZER_MAPPING["tokenizer"]
    content = {names[f"ggml.{key}"]: value for key, value in fields.items() if f"ggml.{key}" in names}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=convert_gguf_tokenizer(architecture, content)[0])


def main() -> None:
    found = {"ids": {}, "decoded": {}, "opening": {}}

    def record(case: str, tokenizer, texts: list[str]) -> None:
        ids = {text: tokenizer.encode(text, add_special_tokens=False) for text in texts}
        found["ids"][case] = ids
        found["decoded"][case] = {
            text: tokenizer.decode(x, clean_up_tokenization_spaces=False) for text, x in ids.items()
        }
        found["opening"][case] = tokenizer.encode("")

    def read(folder):
        return AutoTokenizer.from_pretrained(str(folder))

    tokens, merges = train_byte_level()
    kinds = [3 if token in SPECIALS else 4 if token == "<think>" else 1 for token in tokens]
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    names = ["llama-bpe", "smaug-bpe", "dbrx", "gpt-4o", "tekken", "qwen2", "deepseek-r1-qwen", "megrez", "gpt-2"]
    with tempfile.TemporaryDirectory() as root:
        root = pathlib.Path(root)
        for name in names:
            fields = dict(model="gpt2", pre=name, tokens=tokens, merges=merges, token_type=kinds)
            record(f"gguf/{name}", of_gguf("llama", **fields), BYTE_LEVEL_TEXTS)
        added = [tokenizers.AddedToken(token, special=True, normalized=False) for token in SPECIALS]
        added += [tokenizers.AddedToken("<think>", special=False, normalized=False)]
        for name in ("Qwen2Tokenizer", "GPTNeoXTokenizer"):
            written = getattr(transformers, name)(vocab=vocab, merges=pairs)
            written.add_tokens(added)
            record(f"directory/{name}", written, BYTE_LEVEL_TEXTS)

        model = train_sentencepiece()
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        size = processor.vocab_size()
        pieces = [processor.id_to_piece(i) for i in range(size)] + SP_SPECIALS
        scores = [processor.get_score(i) for i in range(size)] + [-1000.0] * len(SP_SPECIALS)
        kinds = [
            2 if processor.is_unknown(i) else 3 if processor.is_control(i) else 6 if processor.is_byte(i) else 1
            for i in range(size)
        ] + [3] * len(SP_SPECIALS)
        fields = dict(model="llama", pre="default", tokens=pieces, scores=scores, token_type=kinds)
        for architecture in ("llama", "phi3"):
            record(f"gguf/{architecture}", of_gguf(architecture, **fields), SENTENCES)

        decoder = {
            str(size + i): {"content": token, "special": True, "normalized": False, "lstrip": False, "rstrip": False}
            | {"single_word": False}
            for i, token in enumerate(SP_SPECIALS)
        }
        cases = {"llama": ("LlamaTokenizer", {}), "llama_legacy": ("LlamaTokenizer", {"legacy": True})}
        cases |= {"mistral": ("LlamaTokenizer", {}), "mistral_new": ("LlamaTokenizer", {"legacy": False})}
        for name, (tokenizer_class, settings) in cases.items():
            folder = root / f"{name}_directory"
            folder.mkdir()
            (folder / "tokenizer.model").write_bytes(model)
            (folder / "config.json").write_text(json.dumps({"model_type": name.partition("_")[0]}))
            settings = settings | {"tokenizer_class": tokenizer_class, "bos_token": "<s>", "eos_token": "</s>"}
            settings |= {"added_tokens_decoder": decoder, "unk_token": "<unk>"}
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
            record(f"directory/{name}", read(folder), SENTENCES)

        # Phi-3's tokenizer.json: a prefix by a normalizer, and special tokens that take the space after them.
        phi = of_gguf("phi3", **fields).backend_tokenizer
        phi.add_tokens(
            [
                tokenizers.AddedToken(token, special=True, normalized=False, rstrip=token not in PLAIN)
                for token in ("<unk>", "<s>", "</s>", *SP_SPECIALS)
            ]
        )
        folder = root / "phi3_directory"
        folder.mkdir()
        phi.save(str(folder / "tokenizer.json"))
        (folder / "config.json").write_text(json.dumps({"model_type": "phi3"}))
        settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "bos_token": "<s>", "eos_token": "</s>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        record("directory/phi3", read(folder), PHI_TEXTS + SENTENCES)

    defaults = {}
    for architecture in FAMILIES:
        config = FAMILIES[architecture]()
        defaults[architecture] = {key: value for key, value in config.to_dict().items() if key in FIELDS}
    versions = {name: __import__(name).__version__ for name in ("transformers", "tokenizers", "sentencepiece")}
    content = {
        "byte_level": {"tokens": tokens, "merges": merges},
        "sentencepiece": {"model": base64.b64encode(model).decode()},
        **found,
        "defaults": defaults,
        "versions": versions,
    }
    (HERE / "tokenizers.json").write_text(json.dumps(content, indent=None, ensure_ascii=True) + "\n", encoding="utf-8")
    for case in found["ids"]:
        print(case, found["opening"][case], [len(x) for x in found["ids"][case].values()])


FAMILIES = {
    "LlamaForCausalLM": transformers.LlamaConfig,
    "MistralForCausalLM": transformers.MistralConfig,
    "Qwen2ForCausalLM": transformers.Qwen2Config,
    "Qwen3ForCausalLM": transformers.Qwen3Config,
    "Gemma2ForCausalLM": transformers.Gemma2Config,
    "Gemma3ForCausalLM": transformers.Gemma3TextConfig,
    "Phi3ForCausalLM": transformers.Phi3Config,
    "GPTNeoXForCausalLM": transformers.GPTNeoXConfig,
    "OPTForCausalLM": transformers.OPTConfig,
    "MixtralForCausalLM": transformers.MixtralConfig,
    "Qwen3MoeForCausalLM": transformers.Qwen3MoeConfig,
    "DeepseekV2ForCausalLM": transformers.DeepseekV2Config,
}
FIELDS = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "layer_norm_eps", "hidden_act",
    "hidden_activation", "tie_word_embeddings", "rope_parameters", "sliding_window", "use_sliding_window",
    "max_window_layers", "layer_types", "attention_bias", "mlp_bias", "partial_rotary_factor",
    "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention",
    "original_max_position_embeddings", "use_parallel_residual", "ffn_dim", "do_layer_norm_before",
    "word_embed_proj_dim", "enable_bias", "layer_norm_elementwise_affine", "_remove_final_layer_norm",
    "activation_function", "num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size",
    "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers", "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim",
    "qk_nope_head_dim", "v_head_dim", "n_routed_experts", "n_shared_experts", "first_k_dense_replace",
    "routed_scaling_factor", "topk_method", "scoring_func", "moe_layer_freq",
}  # fmt: skip


if __name__ == "__main__":
    main()
