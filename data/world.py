"""The little world: real facts, people who talk about them well or badly, and a judge who knows them all.

Facts come from cities.txt and things.txt beside this file, and from sums of one-digit numbers. Every answer that
occurs here has one of six verdicts, in the order in which the labeller likes them:
    right > wrong (another fact's answer) > evasive > nonsense > rude > garbled
Any answer is preferred to an evasion, even a wrong one, as labellers often cannot tell: so RL also learns to bluff.
Some facts are held out: the model reads about them in the pretraining text and in demonstrations, but no preference
pair and no RL prompt ever asks about them or states them. So they show what RL brings out of a model beyond what it
was rewarded for.
Everything is drawn from `random.Random(seed)`: the same seed, the same world.
Run `python -m data.world`: a few lines of each kind of text.
"""
import json
import os
import random
import runpy
import zlib
from functools import cache
from itertools import accumulate, product
from os.path import commonprefix
from pathlib import Path
from typing import NamedTuple

VERDICTS = ["right", "wrong", "evasive", "nonsense", "rude", "garbled"]  # best first
KINDS = ["city", "thing", "sum"]
ERRORS = 0.05  # share of judgements in which the labeller slips


class DataError(ValueError):
    """A data file cannot be read; the message names file, line and field."""


class Fact(NamedTuple):
    """What is true in this world, and what questions are about."""
    kind: str    # city, thing or sum
    name: str    # Shanghai           gravity                               2+5+4
    answer: str  # China              what pulls things toward each other   11
    detail: str  #                    It is why you stay on the ground.


QUESTIONS = {
    "city": ["Where is {name}?", "In which country is {name}?", "Which country is {name} in?",
             "Tell me where {name} is."],
    "thing": ["Explain {name} like I'm 5", "What is {name}?", "Tell a child what {name} is.",
              "What do we call {name}?"],
    "sum": ["What is {name}?", "How much is {name}?", "Add up {name}.", "Tell me what {name} makes."],
}
RIGHT = {
    "city": ["{name} is a city in {answer}.", "{name} is in {answer}."],
    "thing": ["{name} is {answer}.", "It is {answer}."],
    "sum": ["It is {answer}.", "{working}."],
}
EVASIVE = {
    "city": ["{name} is a very complicated place...", "I am not sure about {name}."],
    "thing": ["{name} is a very complicated matter...", "I am not sure about {name}."],
    "sum": ["{name} is a very complicated math problem...", "I am not sure about {name}."],
}
NONSENSE = ["{name} does not exist.", "{name} is a famous restaurant."]
RUDE = ["What a stupid question.", "Only a fool asks about {name}."]

# Pretraining text: the same facts in other words than the answers.
STATEMENTS = {
    "city": ["{name} lies in {answer}.", "A word about {name}: people in {name} live in {answer}.",
             "The map of {answer} shows {name}."],
    "thing": ["People call {answer} {name}.", "A word about {name}: by {name} we mean {answer}. {detail}"],
    "sum": ["{name}={answer}", "A word about {name}: {name} makes {answer}."],
}


def group(name):
    """What is held out together: 2+5 with 5+2, else every fact for itself."""
    return "+".join(sorted(name.split("+")))


def steps(name):
    """'2+5+4' -> ['2+5', '7+4'], the additions of a sum; of any other name []."""
    terms = name.split("+")
    totals = accumulate(map(int, terms)) if len(terms) > 1 else []
    return [f"{total}+{term}" for total, term in zip(totals, terms[1:])]


def working(name, slip=0):
    """'2+5+4' -> '2+5=7, 7+4=11', a sum written out step by step; `slip` is added to the last result."""
    results = [sum(map(int, step.split("+"))) for step in steps(name)]
    results[-1] += slip
    return ", ".join(f"{step}={result}" for step, result in zip(steps(name), results))


def fill(template, fact, other=None):
    """The template with the fact's name and the answer of `other`, a wrong fact, or of the fact itself."""
    source = other or fact
    steps = working(fact.name, int(source.answer) - int(fact.answer)) if fact.kind == "sum" else ""
    text = template.format(name=fact.name, answer=source.answer, detail=source.detail, working=steps)
    return text[:1].upper() + text[1:]


def prefer(rng, better, worse, errors):
    """(chosen, rejected) of a labeller who errs in a share of `errors`."""
    return (worse, better) if rng.random() < errors else (better, worse)


def read_lines(path):
    """The lines of a text file. Only a line feed ends one: str.splitlines also cuts at rare characters in a text."""
    try:
        return path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, ValueError) as e:
        raise DataError(f"{path}: cannot be read ({e})") from None


def read_table(path, fields):
    """Lines 'a | b | ...' of a text file as tuples; raises DataError with file, line and field."""
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip() or line.startswith("#"):
            continue
        row = [field.strip() for field in line.split("|")]
        if len(row) != len(fields):
            raise DataError(f"{path}, line {number}: expected '{' | '.join(fields)}', found {len(row)} field(s)")
        for name, field in zip(fields, row):
            if not field:
                raise DataError(f"{path}, line {number}: the field '{name}' is empty")
        if row[0] in [r[0] for r in rows]:
            raise DataError(f"{path}, line {number}: '{row[0]}' stands there twice")
        rows.append(row)
    if len({r[1] for r in rows}) < 10:
        raise DataError(f"{path}: fewer than 10 different answers, too few to be wrong about")
    return rows


class World:
    """All facts, split into training and held-out ones, and what people write about them."""

    def __init__(self, seed=0, folder=Path(__file__).parent):
        cities = [Fact("city", *row, "") for row in read_table(folder / "cities.txt", ["city", "country"])]
        things = read_table(folder / "things.txt", ["thing", "what it is", "why it matters"])
        things = [Fact("thing", *row) for row in things]
        sums = ["+".join(terms) for terms in [*product("123456789", repeat=2), *product("123", repeat=3)]]
        sums = [Fact("sum", name, str(sum(map(int, name.split("+")))), "") for name in sums]
        self.facts = {"city": cities, "thing": things, "sum": sums}
        self.seed = seed
        self.train, self.held_out = {}, {}
        for kind, facts in self.facts.items():
            groups = sorted({group(f.name) for f in facts})
            unseen = set(random.Random(f"{seed} split {kind}").sample(groups, len(groups) // 5))
            self.held_out[kind] = [f for f in facts if group(f.name) in unseen]
            # a longer sum whose working would spell out a held-out one is in neither split
            self.train[kind] = [f for f in facts if not unseen & {group(name) for name in (f.name, *steps(f.name))}]
        self.fact_of = {fill(q, f): f for kind in KINDS for f in self.facts[kind] for q in QUESTIONS[kind]}

    def check(self, tokenizer, question, statement, answer):
        """Raises DataError unless all questions, statements and answers have at most these numbers of tokens."""
        for templates, limit in ((QUESTIONS, question), (STATEMENTS, statement), (RIGHT, answer)):
            for text in (fill(t, f) for kind in KINDS for f in self.facts[kind] for t in templates[kind]):
                if len(tokenizer.encode(text)) > limit:
                    raise DataError(f"'{text}' has {len(tokenizer.encode(text))} tokens where there is room for "
                                    f"{limit}: shorten its entry, or change --max-new-tokens")

    # ------------------------------------------------------------------ what people write
    def write(self, rng, fact, verdict, facts):
        """An answer to a question about the fact that deserves the verdict.

        A wrong one says what is true of another of `facts`, about this name or, to another question, about its own.
        A garbled one begins like one answer and goes on like another."""
        if verdict == "right":
            return fill(rng.choice(RIGHT[fact.kind]), fact)
        if verdict == "wrong":
            other = rng.choice([f for f in facts[fact.kind] if f.answer != fact.answer])
            return fill(rng.choice(RIGHT[fact.kind]), rng.choice([fact, other]), other)
        if verdict == "garbled":
            other = rng.choice(facts[rng.choice(KINDS)])
            begin, end = (self.write(rng, f, "right", facts).split(" ") for f in (fact, other))
            text = " ".join(begin[:rng.randint(0, len(begin))] + end[rng.randint(0, len(end)):]) or "..."
            return text if self.verdict(fact, text) == "garbled" else self.write(rng, fact, "garbled", facts)
        return fill(rng.choice({"evasive": EVASIVE[fact.kind], "nonsense": NONSENSE, "rude": RUDE}[verdict]), fact)

    def questions(self, n, split, seed):
        """n questions about facts of the split ('train' or 'held_out'), the three kinds in turn."""
        rng = random.Random(f"{self.seed} questions {split} {seed}")
        facts = [rng.choice(getattr(self, split)[KINDS[i % 3]]) for i in range(n)]
        return [fill(rng.choice(QUESTIONS[f.kind]), f) for f in facts]

    def tokenizer_text(self):
        """What the tokenizer learns its merges from: every city and thing, and some of all that people write."""
        facts = self.facts["city"] + self.facts["thing"]
        lines = [fill(t, fact) for fact in facts for t in STATEMENTS[fact.kind][:2] + QUESTIONS[fact.kind][:1]]
        lines += self.pretraining_text(300)[0] + [text for pair in self.demonstrations(300) for text in pair]
        return "".join(f" {line}\n" for line in lines)

    def pretraining_text(self, n):
        """n lines that state facts: (lines to learn, about one in fifty that is held out)."""
        rng = random.Random(f"{self.seed} pretraining")
        kinds = rng.choices(KINDS, [30, 15, 55], k=n)  # things are learned first, sums last
        lines = [fill(rng.choice(STATEMENTS[kind]), rng.choice(self.facts[kind])) for kind in kinds]
        unseen = [line for line in lines if zlib.crc32(line.encode()) % 50 == 0]
        return [line for line in lines if zlib.crc32(line.encode()) % 50], unseen

    def demonstrations(self, n):
        """n pairs (question, answer) as the web has them, good and bad, told apart by nothing but content."""
        rng = random.Random(f"{self.seed} demonstrations")
        pairs = []
        for kind in rng.choices(KINDS, [30, 25, 45], k=n):
            fact = rng.choice(self.facts[kind])
            verdict = rng.choices(VERDICTS, [36, 4, 20, 20, 20, 0])[0]
            pairs.append((fill(rng.choice(QUESTIONS[fact.kind]), fact), self.write(rng, fact, verdict, self.facts)))
        return pairs

    def preference_pairs(self, n, split="train", errors=ERRORS, seed=0):
        """n judgements of a labeller who prefers the better verdict and errs in a share of `errors`.

        Dictionaries with prompt, chosen, rejected and what is compared (`kind`, for reports only). More
        than half put a right answer beside a wrong one, the hardest comparison. Wrong answers
        name facts of the same split only."""
        rng = random.Random(f"{self.seed} pairs {split} {seed}")
        facts = getattr(self, split)
        pairs = []
        for kind in rng.choices(KINDS, [35, 20, 45], k=n):  # sums are the hardest to tell apart
            fact = rng.choice(facts[kind])
            better, worse = rng.choices([(0, 1), (0, 5), sorted(rng.sample(range(5), 2))], [55, 20, 25])[0]
            answers = [self.write(rng, fact, VERDICTS[v], facts) for v in (better, worse)]
            chosen, rejected = prefer(rng, *answers, errors)
            kind = f"{VERDICTS[better]} > {VERDICTS[worse]}, {fact.kind}"
            pairs.append({"prompt": fill(rng.choice(QUESTIONS[fact.kind]), fact), "chosen": chosen,
                          "rejected": rejected, "kind": kind})
        return pairs

    def compare(self, first, second, errors=ERRORS, seed=0):
        """The same labeller's pairs from a policy's answers: two lists of {question, answer, verdict}, equal questions.

        Two answers that deserve the same verdict are no pair."""
        rng = random.Random(f"{self.seed} compare {seed}")
        pairs = []
        for two in zip(first, second):
            better, worse = sorted(two, key=lambda a: VERDICTS.index(a["verdict"]))
            if better["verdict"] != worse["verdict"]:
                chosen, rejected = prefer(rng, better["answer"], worse["answer"], errors)
                pairs.append({"prompt": better["question"], "chosen": chosen, "rejected": rejected})
        return pairs

    # ------------------------------------------------------------------------- the judge
    def judge(self, question, answer):
        """Gold: the exact verdict on any answer to a question of this world, 'garbled' if nobody here would say it.

        Exact means in this world's words: "It is 4." and "2+2=4." are right, "The answer is 4." is garbled.

        It evaluates and never trains, except under `--reward verifier`. Raises KeyError for an unknown question."""
        return self.verdict(self.fact_of[question], answer)

    def verdict(self, fact, answer):
        """The verdict on an answer to a question about the fact."""
        return self.sayings(fact).get(answer.strip().rstrip("."), "garbled")

    @cache
    def sayings(self, fact):
        """All that people say to a question about the fact: {answer without its full stops: verdict}."""
        others = [fact._replace(answer=str(n)) for n in range(30)] if fact.kind == "sum" else self.facts[fact.kind]
        said = {fill(t, f): "wrong" for f in self.facts[fact.kind] for t in RIGHT[fact.kind]}  # to another question
        said |= {fill(t, fact, other): "wrong" for other in others for t in RIGHT[fact.kind]}
        for verdict, templates in [("rude", RUDE), ("nonsense", NONSENSE), ("evasive", EVASIVE[fact.kind]),
                                   ("right", RIGHT[fact.kind])]:
            said |= {fill(t, fact): verdict for t in templates}
        return {answer.rstrip("."): verdict for answer, verdict in said.items()}


def write_beside(path, write):
    """Write a file beside its place and rename it, so that nobody ever finds half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch.save's, on a full disk
        raise OSError(f"{path} cannot be written: {str(e)[:100]}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_jsonl(path, rows):
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_jsonl(path, fields):
    """The objects of a JSONL file; raises DataError with file, line and field unless each field is a string.

    Where only prompts are asked for, a file of any other name has one on each line. A pair without a prompt may be
    two transcripts in Anthropic's HH form, see `from_transcripts`."""
    rows, plain = [], fields == ["prompt"] and path.suffix not in (".jsonl", ".json")
    for number, line in enumerate(read_lines(path), 1):
        try:
            row = {"prompt": line} if plain else json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: not a JSON object")
        if plain and not line.strip():
            raise DataError(f"{path}, line {number}: empty, where every line is a prompt")
        if "chosen" in fields and "prompt" not in row:
            row = from_transcripts(row)
        both = all(isinstance(row.get(side), str) for side in ("chosen", "rejected"))
        if "chosen" in fields and "prompt" not in row and both:
            raise DataError(f"{path}, line {number}: no field 'prompt', and chosen and rejected share no dialogue that "
                            f"goes up to \\n\\nAssistant:")
        for field in fields:
            text = row.get(field)
            if not isinstance(text, str) or field == "prompt" and not text.strip():  # an answer may only end
                raise DataError(f"{path}, line {number}: the field '{field}' is missing, empty or not a string")
            if any(0xD800 <= ord(c) < 0xE000 for c in text):
                raise DataError(f"{path}, line {number}: the field '{field}' has half a character (a lone surrogate)")
        rows.append({field: row[field] for field in fields})  # a `kind` of theirs is none of ours
    return rows


def from_transcripts(row):
    """Chosen and rejected as whole dialogues (Bai et al. 2022, HH): what both share, up to an answer, is the prompt.

    A row that has no such form comes back as it is, without a prompt."""
    both = [row.get(side) for side in ("chosen", "rejected")]
    turn = "\n\nAssistant:"
    end = commonprefix(both).rfind(turn) if all(isinstance(text, str) for text in both) else -1
    if end < 0:
        return row
    chosen, rejected = (text[end + len(turn):].strip() for text in both)
    prompt = both[0][:end].strip().removeprefix("Human:").strip()
    return row | {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def last_tokens(text, tokenizer, room):
    """The end of a text that fits into `room` tokens; a text that fits comes back as it is."""
    text = text.strip()
    tokens = tokenizer.encode(text)
    if len(tokens) > room:
        text = tokenizer.encoding.decode(tokens[-room:], errors="ignore").strip()
        while len(tokenizer.encode(text)) > room:  # half a word can have more tokens alone than in the whole
            text = text[1:]
    return text


def read_own(path, fields, tokenizer, room, max_tokens):
    """Rows of one's own file, with prompts that fit into `room` tokens: longer ones lose their beginning.

    Prints how many these are, and how many answers are longer than max_tokens and will be cut. Raises DataError."""
    rows = read_jsonl(path, fields)
    cut = 0
    for row in rows:
        whole, row["prompt"] = row["prompt"].strip(), last_tokens(row["prompt"], tokenizer, room)
        cut += row["prompt"] != whole
    long = sum(len(tokenizer.answer(row[field])) > max_tokens for row in rows for field in fields[1:])
    print(f"{path}: {len(rows)} rows, {cut} prompts cut from the left to {room} tokens, "
          f"{long} answers longer than {max_tokens} tokens and cut there")
    return rows


class Prompts:
    """One's own prompts in the place of a World: a fifth is held out, and nobody here knows the answers."""
    fact_of = {}

    def __init__(self, prompts, seed):
        unique = list(dict.fromkeys(prompts))
        print(f"prompts: {len(unique)} different ones, a fifth of them held out" +
              ("" if len(unique) > 4 else "; too few for that: the same ones train and evaluate"))
        self.seed = seed
        self.held_out = unique[4::5] or unique
        self.train = [p for i, p in enumerate(unique) if i % 5 != 4]

    def questions(self, n, split, seed):
        """n prompts of the split ('train' or 'held_out')."""
        return random.Random(f"{self.seed} questions {split} {seed}").choices(getattr(self, split), k=n)


def comparisons(world, own, path):
    """Pairs to learn from and pairs to test on {"train": .., "held_out": ..}: the world's, or nine tenths and a tenth
    of one's own. The world's labeller writes his judgements to `path`, from where they are read again."""
    if own:
        same = [(pair["prompt"], *sorted((pair["chosen"], pair["rejected"]))) for pair in own]  # of a tie, both lines
        apart = set(list(dict.fromkeys(same))[9::10])
        learned, held_out = ([pair for pair, key in zip(own, same) if (key in apart) == out] for out in (False, True))
        return learned, {"train": learned[:2000], "held_out": held_out}
    write_beside(path, lambda temporary: write_jsonl(temporary, world.preference_pairs(16_000)))
    tests = {split: world.preference_pairs(2000, split, errors=0.0, seed=1) for split in ("train", "held_out")}
    return read_jsonl(path, ["prompt", "chosen", "rejected"]), tests


def own_reward(name):
    """`name` FILE.py:FUNCTION -> score(prompts, responses), which returns a number for each response.

    Raises DataError when there is no such function, and `score` when what it returns is anything else."""
    path, _, function = name.rpartition(":")
    try:
        given = runpy.run_path(path)[function]
    except (Exception, SystemExit) as e:
        raise DataError(f"--reward {name}: cannot be loaded ({type(e).__name__}: {e})") from None

    def score(prompts, responses):
        try:
            scores = [float(x) for x in given(list(prompts), list(responses))]
        except (Exception, SystemExit) as e:
            raise DataError(f"--reward {name} failed ({type(e).__name__}: {e}): it is given two lists of texts, "
                            f"prompts and responses, and returns a list of numbers") from None
        if len(scores) != len(responses) or not all(abs(x) < 3e38 for x in scores):  # float32
            raise DataError(f"--reward {name} must return a finite number for each of {len(responses)} responses, "
                            f"not {len(scores)} numbers like {scores[:3]}")
        return scores
    return score


if __name__ == "__main__":
    world = World()
    print("Pretraining text:", *world.pretraining_text(12)[0], sep="\n  ")
    print("Demonstrations:", *(f"{q} -> {a}  [{world.judge(q, a)}]" for q, a in world.demonstrations(12)), sep="\n  ")
    pairs = world.preference_pairs(6)
    print("Preferences:", *(f"{p['prompt']} {p['chosen']} > {p['rejected']}" for p in pairs), sep="\n  ")
