"""Judges: who says how good a response is. A function (prompts, responses) -> rewards, both lists of strings.

    golden    the true reward of the built-in world (data.py)
    vader     the sentiment of the text by VADER's rated words and rules, log-odds (pip install vaderSentiment)
    DIR       what the directory holds: judge.json, a bag of words (recipes/sentiment_judge.py makes one), or a
              sequence-classification model: a reward model of rlhf.py, or any with one label or two
    none      nobody

Any of them can label pairs or measure an outcome. A reward is a real number; where pairs are labelled at
random, P(a beats b) = sigmoid(reward(a) - reward(b)). Each of these judges can be gamed: report a second one.
"""

import json
import math
import re
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import data
import lm


def load_judge(name: str, device: str = "cpu"):
    """The judge of that name, see above; None for "none"."""
    if name in ("golden", "none"):
        return data.golden_judge if name == "golden" else None
    if name == "vader":
        return vader_judge()
    if (Path(name) / "judge.json").exists():
        return bag_of_words_judge(Path(name) / "judge.json")
    if not Path(name).is_dir():
        raise ValueError(f"--judge {name}: neither golden, vader or none, nor a directory with a judge.json or a "
                         "sequence-classification model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForSequenceClassification.from_pretrained(name, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"--judge {name}: this holds neither a judge.json nor a sequence-classification model that "
                         f"transformers can load ({str(error).partition(chr(10))[0]})") from None
    model.eval().to(device)
    if model.config.num_labels > 2:
        raise ValueError(f"--judge {name}: a reward is one number, but this {type(model).__name__} has "
                         f"{model.config.num_labels} labels; it needs one, or two of which the second is the good one")
    if model.config.num_labels == 1 and hasattr(model, "score"):
        return reward_model_judge(model, tokenizer)
    return classifier_judge(model, tokenizer)


def reward_model_judge(model, tokenizer):
    """A decoder with one label: its score at the last token of prompt + response + EOS (found by length)."""
    center = getattr(model.config, "reward_center", 0.0)  # rlhf.py writes both; other models have neither
    bound = getattr(model.config, "reward_clip", None) or math.inf

    @torch.no_grad()
    def judge(prompts: list[str], responses: list[str], batch_size: int = 64) -> list[float]:
        rewards, room = [], lm.context_length(model)
        for i in range(0, len(prompts), batch_size):
            response_ids = [lm.encode_response(tokenizer, text, room - 1) for text in responses[i:i + batch_size]]
            prompt_ids = [lm.encode_prompt(tokenizer, text)[len(response) - room:]  # a long prompt loses its start
                          for text, response in zip(prompts[i:i + batch_size], response_ids)]
            rewards += (lm.final_scores(model, prompt_ids, response_ids) - center).clamp(-bound, bound).tolist()
        return rewards

    return judge


def classifier_judge(model, tokenizer):
    """Any other classifier, fed as its tokenizer feeds it: one label is the reward, of two the second's log-odds."""
    @torch.no_grad()
    def judge(prompts: list[str], responses: list[str], batch_size: int = 64) -> list[float]:
        texts, rewards = [p + y for p, y in zip(prompts, responses, strict=True)], []
        longest = min(tokenizer.model_max_length, lm.context_length(model))
        can_pad = tokenizer.pad_token_id is not None and model.config.pad_token_id is not None
        for i in range(0, len(texts), batch_size if can_pad else 1):
            batch = tokenizer(texts[i:i + (batch_size if can_pad else 1)], return_tensors="pt", padding=can_pad,
                              truncation=True, max_length=longest).to(model.device)
            logits = model(**batch).logits.float()  # (b, 1) or (b, 2)
            rewards += (logits[:, -1] - (logits[:, 0] if logits.shape[1] == 2 else 0)).tolist()
        return rewards

    return judge


def vader_judge():
    """Log-odds of the compound score c: log((1 + c) / (1 - c)), for c in (-1, 1) is a probability's 2p - 1."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise ValueError("the judge vader is not installed; run: pip install vaderSentiment==3.3.2") from None
    analyzer = SentimentIntensityAnalyzer()

    def judge(prompts: list[str], responses: list[str]) -> list[float]:
        compound = [analyzer.polarity_scores(p + y)["compound"] for p, y in zip(prompts, responses, strict=True)]
        return [2 * math.atanh(max(-0.9999, min(0.9999, c))) for c in compound]

    return judge


def bag_of_words_judge(path):
    """Log-odds that a text is positive, by logistic regression on the TF-IDF of its words and pairs of words.

    path: JSON with the regular expression of a word, the intercept, and [idf, weight] of every n-gram.
    """
    model = json.loads(Path(path).read_text(encoding="utf-8"))
    word, weights = re.compile(model["pattern"]), model["weights"]

    def log_odds(text: str) -> float:
        words = word.findall(text.lower())
        counts = Counter(gram for gram in [*words, *map(" ".join, zip(words, words[1:]))] if gram in weights)
        tfidf = {gram: n * weights[gram][0] for gram, n in counts.items()}
        norm = math.sqrt(sum(value * value for value in tfidf.values())) or 1.0
        return model["intercept"] + sum(value * weights[gram][1] for gram, value in tfidf.items()) / norm

    return lambda prompts, responses: [log_odds(p + y) for p, y in zip(prompts, responses, strict=True)]
