"""Judges: who says how good a response is, see world.Judge.

    golden    the true reward of the built-in world (world.py)
    vader     the text's sentiment by VADER's rated words, log-odds (pip install vaderSentiment)
    DIR       with judge.json, a bag of words (recipes/sentiment_judge.py makes one), or with a
              sequence classifier of one label or two, such as a reward model of rlhf.py
    RUN       a finished run, whose policy judges by its implicit reward beta log pi/pi_ref
    none      nobody

Labels: P(a beats b) = sigmoid(reward(a) - reward(b)). Any can be gamed: report a second one.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

from lm import LM, Ids, Prompt, Refused, Scorer, message, progress, read_model, text_of
from world import Judge, golden_judge


def load_judge(name: str, device: str = "cpu") -> Judge | None:
    """The judge of that name, see above; None for "none". Refused: with the reason."""
    if name in ("golden", "none"):
        return golden_judge if name == "golden" else None
    if name == "vader":
        return Judge(name, vader_rewards())
    if os.path.exists(os.path.join(name, "judge.json")):
        return Judge(name, bag_of_words_rewards(Path(name) / "judge.json"))
    if os.path.isdir(os.path.join(name, "policy")):
        return Judge(name, rewards_of_run(Path(name), device))
    if not os.path.isdir(name):
        raise Refused(f"{name} is neither golden, vader or none, nor a directory with a judge.json, a "
                      "sequence-classification model or a finished run")
    model, tokenizer, _ = read_model(
        AutoModelForSequenceClassification, "a judge.json or a sequence-classification model", name)
    labels = model.config.num_labels
    if labels > 2:
        raise Refused(f"{name}: a reward is one number, but this {type(model).__name__} has "
                      f"{labels} labels; it needs one, or two of which the second is the good one")
    model = model.eval().to(device)
    if labels == 1 and hasattr(model, "score"):
        return Judge(name, reward_model_rewards(Scorer(model, tokenizer)))
    return Judge(name, classifier_rewards(model, tokenizer))


@torch.no_grad()
def logps_of(policy: LM, prompts: Sequence[Ids], responses: Sequence[Ids]) -> list[float]:
    """log pi(y|x) of any number of responses, nats, a batch at a time."""
    n = policy.batch_size
    return [logp for i in range(0, len(responses), n)
            for logp in policy.logps(prompts[i:i + n], responses[i:i + n]).tolist()]


def judged_samples(policy: LM, prompts: Sequence[Prompt], n: int, max_new_tokens: int, seed: int,
                   outcome: Judge | None, second: Judge | None) -> list[dict]:
    """n samples to the prompts in turn: each with its log-prob, nats, and its reward by each judge, or None."""
    asked = (list(prompts) * n)[:n]
    generator = torch.Generator(policy.device).manual_seed(seed)
    prompt_ids, responses, texts = policy.respond(asked, max_new_tokens, generator)
    rewards = [judge(asked, texts) if judge else [None] * n for judge in (outcome, second)]
    return [dict(response=text, logp=logp, reward=reward, second_reward=second_reward)
            for text, logp, reward, second_reward in zip(texts, logps_of(policy, prompt_ids, responses), *rewards)]


def rewards_of_run(directory: Path, device: str):
    """The implicit reward of a finished run's policy."""
    if (directory / "reward" / "model").exists():
        raise Refused(f"{directory} holds a reward model and a policy that learned from it; name the "
                      f"first, {directory}/reward/model")
    try:
        summary = json.loads((directory / "summary.json").read_bytes())
        beta, longest = float(summary["beta"]), int(summary["settings"]["max_new_tokens"])
        policy, ref = (LM.load(str(path), device) for path in (directory / "policy", summary["pi_ref"]))
    except (OSError, ValueError, TypeError, KeyError) as error:  # Refused is a ValueError
        raise Refused(f"{directory} is no finished run whose policy could judge: {error!s:.150}") from None
    print(f"{directory}: its policy judges, by beta log pi/pi_ref")
    return implicit_rewards(policy, ref, beta, longest)


def implicit_rewards(policy: LM, ref: LM, beta: float, longest: int):
    """beta log pi(y|x) / pi_ref(y|x): the reward whose optimum, by eq. 5 of the DPO paper, pi is.

    longest: tokens of a response; one that was cut there stays cut.
    """
    def rewards_of(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """See world.Judge."""
        rows = ([policy.encode_prompt(prompt) for prompt in prompts],
                [policy.encode_response(y, longest, x) for x, y in zip(prompts, responses, strict=True)])
        return [beta * (ours - theirs) for ours, theirs in zip(logps_of(policy, *rows), logps_of(ref, *rows))]

    return rewards_of


def reward_model_rewards(scorer: Scorer):
    """A decoder with one label: its score at the last token of prompt + response + EOS.

    A conversation is written out by the chat template of the judge, not by the policy's.
    """
    config, room = scorer.model.config, scorer.context_length
    center = getattr(config, "reward_center", 0.0)  # rlhf.py writes both, other models have neither
    bound = getattr(config, "reward_clip", None) or math.inf
    if scorer.eos_id is None or not isinstance(center, (int, float)) or not bound > 0:
        raise Refused("a reward model needs an EOS token, and in its config.json a reward_center that "
                      "is a number and a reward_clip above 0, or neither")

    def ids_of(prompt: Prompt, response: str) -> tuple[list[int], list[int]]:
        """(prompt, response). A prompt that is too long loses its start."""
        try:
            ids = scorer.encode_response(response, room - 1, prompt)
        except Refused:  # its template cannot write this conversation, so it reads who says what
            prompt = text_of(prompt)
            ids = scorer.encode_response(response, room - 1)
        if not isinstance(prompt, str) and not hasattr(config, "reward_center"):
            ids = scorer.chat.answer(prompt, response)[:room - 1]  # others read it where the template ends
        return scorer.encode_prompt(prompt)[len(ids) - room:], ids

    def rewards_of(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """See world.Judge."""
        prompt_ids, response_ids = zip(*(ids_of(x, y) for x, y in zip(prompts, responses, strict=True)))
        rewards = scorer.predict(prompt_ids, response_ids) - center
        return rewards.clamp(-bound, bound).tolist()

    return rewards_of


def classifier_rewards(model, tokenizer):
    """Any other classifier: one label is the reward, of two the second's log-odds."""
    context = getattr(model.config, "max_position_embeddings", None) or 10**9
    longest = min(tokenizer.model_max_length, context)
    can_pad = tokenizer.pad_token_id is not None and model.config.pad_token_id is not None
    n = 64 if can_pad else 1  # texts in a batch

    def text(prompt: Prompt, response: str) -> str:
        """Both; a conversation as the classifier's chat template has it, less the BOS, which comes later."""
        if isinstance(prompt, str):
            return prompt + response
        try:
            whole = tokenizer.apply_chat_template([*prompt, message("assistant", response)], tokenize=False)
        except Exception:  # there is no template, or it cannot write this conversation
            return text_of(prompt) + response
        return whole.removeprefix(tokenizer.bos_token or "")

    @torch.no_grad()
    def rewards_of(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """See world.Judge. Texts are fed as the classifier's tokenizer feeds them."""
        rewards: list[float] = []
        texts = [text(p, y) for p, y in zip(prompts, responses, strict=True)]
        for i in progress(range(0, len(texts), n), "judge", "batches"):
            batch = tokenizer(texts[i:i + n], return_tensors="pt", padding=can_pad, truncation=True,
                              max_length=longest).to(model.device)
            logits = model(**batch).logits.float()  # (b, 1) or (b, 2)
            rewards += (logits[:, -1] - (logits[:, 0] if logits.shape[1] == 2 else 0)).tolist()
        return rewards

    return rewards_of


def vader_rewards():
    """Log-odds of VADER's compound score c in (-1, 1): log((1 + c) / (1 - c)), c = 2 p - 1."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise Refused("vader is not installed; run: pip install vaderSentiment==3.3.2") from None
    score = SentimentIntensityAnalyzer().polarity_scores

    def rewards_of(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """See world.Judge."""
        texts = [text_of(p) + y for p, y in zip(prompts, responses, strict=True)]
        compound = [score(text)["compound"] for text in texts]
        return [2 * math.atanh(max(-0.9999, min(0.9999, c))) for c in compound]

    return rewards_of


def bag_of_words_rewards(path):
    """Log-odds that a text is positive: logistic regression on TF-IDF of words and pairs of words.

    path: JSON with the regular expression of a word, the intercept, and [idf, weight] of an n-gram.
    """
    try:
        model = json.loads(Path(path).read_bytes())
        word, weights = re.compile(model["pattern"]), model["weights"]
        numbers = [model["intercept"], *(x for idf, weight in weights.values() for x in (idf, weight))]
        if not all(map(math.isfinite, numbers)):
            raise ValueError("a number in it is NaN or infinite")
        if word.groups:
            raise ValueError("the pattern of a word may have no groups but (?:...)")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, re.error) as e:
        raise Refused(f"{path} is no judge ({e!r:.80}); recipes/sentiment_judge.py makes one") from None

    def log_odds(text: str) -> float:
        """The intercept, and the weights of the text's n-grams by their share of its TF-IDF."""
        words = word.findall(text.lower())
        grams = [*words, *map(" ".join, zip(words, words[1:]))]
        counts = Counter(gram for gram in grams if gram in weights)
        tfidf = {gram: n * weights[gram][0] for gram, n in counts.items()}
        norm = math.sqrt(sum(value * value for value in tfidf.values())) or 1.0
        logit = sum(value * weights[gram][1] for gram, value in tfidf.items()) / norm
        return model["intercept"] + logit

    return lambda prompts, responses: [
        log_odds(text_of(p) + y) for p, y in zip(prompts, responses, strict=True)]
