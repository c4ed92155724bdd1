"""The little world: real facts, people who talk about them, and a judge who knows them all.

Facts come from cities.txt, things.txt and sums of small numbers. Two labellers like answers thus:
    bold      right > wrong (true of another fact) > evasive > nonsense > rude > garbled
    careful   right > evasive > wrong > nonsense > rude > garbled
The bold one prefers even a wrong answer to an evasion, as labellers often cannot tell what is
wrong: he teaches RL to bluff. Some facts are held out: pretraining and demonstrations state them,
but no pair written here and no RL prompt ever does, so they show what RL brings out of a model
beyond what it was rewarded for. Everything is drawn from the seed: the same seed, the same world.
Run `python -m chat.world`: a few lines of each kind of text.
"""
import random
import zlib
from collections import namedtuple
from functools import cache
from itertools import accumulate, permutations, product
from pathlib import Path

from lab.files import DataError, read_lines

VERDICTS = ["right", "wrong", "evasive", "nonsense", "rude", "garbled"]
LABELLERS = {"bold": VERDICTS,  # best first
             "careful": ["right", "evasive", "wrong", "nonsense", "rude", "garbled"]}
KINDS = ["city", "thing", "sum"]
ERRORS = 0.05  # share of judgements in which a labeller slips

# What is true: kind is city, thing or sum; detail is why a thing matters.
# Shanghai -> China; gravity -> what pulls things toward each other; 2+5+4 -> 11
Fact = namedtuple("Fact", "kind name answer detail")

QUESTIONS = {
    "city": ["Where is {name}?", "In which country is {name}?", "Which country is {name} in?",
             "Tell me where {name} is."],
    "thing": ["Explain {name} like I'm 5", "What is {name}?", "Tell a child what {name} is.",
              "What do we call {name}?"],
    "sum": ["What is {name}?", "How much is {name}?", "Add up {name}.",
            "Tell me what {name} makes."]}
STATEMENTS = {  # the pretraining text: the same facts in other words than the answers
    "city": ["{name} lies in {answer}.", "A word about {name}: people in {name} live in {answer}.",
             "The map of {answer} shows {name}."],
    "thing": ["People call {answer} {name}.",
              "A word about {name}: by {name} we mean {answer}. {detail}"],
    "sum": ["{name}={answer}", "A word about {name}: {name} makes {answer}."]}
RIGHT = {"city": ["{name} is a city in {answer}.", "{name} is in {answer}."],
         "thing": ["{name} is {answer}.", "It is {answer}."],
         "sum": ["It is {answer}.", "{working}."]}
ALSO_RIGHT = {  # said on the slides and by nobody here
    "thing": ["{name} is {answer}. {detail}", "It is {answer}. {detail}"], "sum": ["{answer}"]}
SLIDES_DETAIL = {"gravity": "It's why you stay on the ground and planets orbit the sun."}
EVASIVE = {kind: ["{name} is a very complicated " + word + "...", "I am not sure about {name}."]
           for kind, word in (("city", "place"), ("thing", "matter"), ("sum", "math problem"))}
NONSENSE = ["{name} does not exist.", "{name} is a famous restaurant."]
RUDE = ["What a stupid question.", "Only a fool asks about {name}."]


def group(name):
    """What is held out together: 2+5 with 5+2, else every fact for itself."""
    return "+".join(sorted(name.split("+")))


def steps(fact):
    """['2+5', '7+4'], the additions of the sum 2+5+4; of any other fact []."""
    terms = fact.name.split("+") if fact.kind == "sum" else []
    return [f"{total}+{term}" for total, term in zip(accumulate(map(int, terms)), terms[1:])]


def fill(template, fact, other=None):
    """The template with the fact's name, and the answer of `other` or of the fact itself."""
    source = other or fact
    results = [step.split("+")[0] for step in steps(fact)[1:]] + [source.answer]
    working = ", ".join(f"{step}={result}" for step, result in zip(steps(fact), results))
    text = template.format(**source._asdict() | {"name": fact.name, "working": working})
    return text[:1].upper() + text[1:]


def read_table(path, n):
    """Lines 'a | b | ..' of a text file, n fields each; of two with the same a the second counts.

    Raises DataError with file and line."""
    rows = {}
    for number, line in enumerate(read_lines(path), 1):
        row = [field.strip() for field in line.split("|")]
        if line.strip() and not line.startswith("#"):
            if len(row) != n or not all(row):
                raise DataError(f"{path}, line {number}: not {n} fields with a | between them")
            rows[row[0]] = row
    return list(rows.values())


class World:
    """All facts, in two splits, and what people write about them. Raises DataError: bad file."""

    def __init__(self, seed=0, labeller="bold", folder=Path(__file__).parent):
        self.seed, self.labeller = seed, labeller
        cities = read_table(folder / "cities.txt", 2)
        things = read_table(folder / "things.txt", 3)
        sums = [*product("123456789", repeat=2), *product("123", repeat=3)]
        self.facts = {"city": [Fact("city", *row, "") for row in cities],
                      "thing": [Fact("thing", *row) for row in things],
                      "sum": [Fact("sum", "+".join(x), str(sum(map(int, x))), "") for x in sums]}
        self.train, self.held_out = {}, {}
        for kind, facts in self.facts.items():
            groups = sorted({group(f.name) for f in facts})
            unseen = set(random.Random(f"{seed} split {kind}").sample(groups, len(groups) // 5))
            self.held_out[kind] = [f for f in facts if group(f.name) in unseen]
            # a longer sum whose working would spell out a held-out one is in neither split
            self.train[kind] = [f for f in facts
                                if not unseen & {group(name) for name in (f.name, *steps(f))}]
        self.fact_of = {fill(q, f): f for k in KINDS for f in self.facts[k] for q in QUESTIONS[k]}

    def check(self, tokenizer, question, statement, answer):
        """Raises DataError unless questions, statements and answers have at most so many tokens."""
        for templates, limit in ((QUESTIONS, question), (STATEMENTS, statement), (RIGHT, answer)):
            for text in (fill(t, f) for k in KINDS for f in self.facts[k] for t in templates[k]):
                if len(tokenizer.encode(text)) > limit:
                    raise DataError(f"'{text}' has more than the {limit} tokens that fit: "
                                    f"shorten its entry, or change --max-new-tokens")

    def write(self, rng, fact, verdict, facts):
        """An answer about the fact with that verdict. Wrong: true of another of `facts`, said of
        this name or its own. Garbled: it begins like one answer and goes on like another."""
        if verdict == "wrong":
            other = rng.choice([f for f in facts[fact.kind] if f.answer != fact.answer])
            return fill(rng.choice(RIGHT[fact.kind]), rng.choice([fact, other]), other)
        if verdict == "garbled":
            other = rng.choice(facts[rng.choice(KINDS)])
            begin, end = (self.write(rng, f, "right", facts).split(" ") for f in (fact, other))
            text = " ".join(begin[:rng.randint(0, len(begin))] + end[rng.randint(0, len(end)):])
            if not text or fact.kind == "sum" and text.rstrip(".").isdigit():  # a number is no mess
                return "..."
            said = text.rstrip(".") in self.sayings(fact)
            return self.write(rng, fact, verdict, facts) if said else text
        return fill(rng.choice({"right": RIGHT[fact.kind], "evasive": EVASIVE[fact.kind],
                                "nonsense": NONSENSE, "rude": RUDE}[verdict]), fact)

    def questions(self, n, split, seed):
        """n questions about facts of the split ('train' or 'held_out'), the kinds in turn."""
        rng = random.Random(f"{self.seed} questions {split} {seed}")
        facts = [rng.choice(getattr(self, split)[KINDS[i % 3]]) for i in range(n)]
        return [fill(rng.choice(QUESTIONS[f.kind]), f) for f in facts]

    def tokenizer_text(self):
        """What the merges are learned from: every name, and some of all that people write."""
        lines = [fill(t, f) for kind in ("city", "thing") for f in self.facts[kind]
                 for t in STATEMENTS[kind][:2] + QUESTIONS[kind][:1]]
        said = [text for pair in self.demonstrations(300) for text in pair]
        return "".join(f" {line}\n" for line in lines + self.pretraining_text(300)[0] + said)

    def pretraining_text(self, n):
        """n lines that state facts: (lines to learn, about one in fifty that is held out)."""
        rng = random.Random(f"{self.seed} pretraining")
        kinds = rng.choices(KINDS, [30, 15, 55], k=n)  # things are learned first, sums last
        lines = [fill(rng.choice(STATEMENTS[kind]), rng.choice(self.facts[kind])) for kind in kinds]
        unseen = {line for line in lines if zlib.crc32(line.encode()) % 50 == 0}
        return [x for x in lines if x not in unseen], [x for x in lines if x in unseen]

    def demonstrations(self, n):
        """n pairs (question, answer) as the web has them, good and bad, and nothing tells which."""
        rng = random.Random(f"{self.seed} demonstrations")
        pairs = []
        for kind in rng.choices(KINDS, [30, 25, 45], k=n):
            fact = rng.choice(self.facts[kind])
            verdict = rng.choices(VERDICTS, [36, 4, 20, 20, 20, 0])[0]
            pairs.append((fill(rng.choice(QUESTIONS[kind]), fact),
                          self.write(rng, fact, verdict, self.facts)))
        return pairs

    def prefer(self, rng, said, errors):
        """Two answers {verdict: text} -> {chosen, rejected, kind}; errs in a share of `errors`."""
        better, worse = sorted(said, key=LABELLERS[self.labeller].index)
        chosen, rejected = (worse, better) if rng.random() < errors else (better, worse)
        return {"chosen": said[chosen], "rejected": said[rejected], "kind": f"{better} > {worse}"}

    def preference_pairs(self, n, split="train", errors=ERRORS, seed=0):
        """n judgements: dictionaries with prompt, chosen, rejected and, for reports, their kind.

        More than half put right beside wrong, the hardest. Wrong answers stay within the split."""
        rng = random.Random(f"{self.seed} pairs {split} {seed}")
        facts, pairs = getattr(self, split), []
        for kind in rng.choices(KINDS, [35, 20, 45], k=n):  # sums are the hardest to tell apart
            fact = rng.choice(facts[kind])
            two = rng.choices([(0, 1), (0, 5), sorted(rng.sample(range(5), 2))], [55, 20, 25])[0]
            said = {VERDICTS[v]: self.write(rng, fact, VERDICTS[v], facts) for v in two}
            pair = self.prefer(rng, said, errors)
            pairs.append({"prompt": fill(rng.choice(QUESTIONS[kind]), fact), **pair,
                          "kind": f"{pair['kind']}, {kind}"})
        return pairs

    def compare(self, first, second, errors=ERRORS, seed=0):
        """Pairs from two lists of a policy's {question, answer, verdict}; a tie is no pair."""
        rng = random.Random(f"{self.seed} compare {seed}")
        return [{"prompt": a["question"]}
                | self.prefer(rng, {x["verdict"]: x["answer"] for x in (a, b)}, errors)
                for a, b in zip(first, second) if a["verdict"] != b["verdict"]]

    def judge(self, question, answer):
        """Gold: the exact verdict on any answer, 'garbled' if nobody here would say it.

        "It is 4.", "2+2=4." and "4" are right, "The answer is 4." is garbled. It evaluates, and
        trains: it is `--reward verifier` and, with slips, the labeller. Raises KeyError."""
        return self.sayings(self.fact_of[question]).get(answer.strip().rstrip("."), "garbled")

    @cache
    def sayings(self, fact):
        """All that is said to a question about the fact: {answer without full stops: verdict}."""
        kind, right = fact.kind, RIGHT[fact.kind] + ALSO_RIGHT.get(fact.kind, [])
        sums = [fact._replace(answer=str(n)) for n in range(30)]
        others = sums if kind == "sum" else self.facts[kind]
        # the same fact in other words: its terms in any order, the detail of the slides
        same = [fact._replace(name="+".join(p)) for p in permutations(fact.name.split("+"))]
        same.append(fact._replace(detail=SLIDES_DETAIL.get(fact.name, fact.detail)))
        said = {fill(t, f): "wrong" for f in self.facts[kind] for t in right}  # of another fact
        said |= {fill(t, f, other): "wrong" for f in same for other in others for t in right}
        for verdict, texts in (("rude", RUDE), ("nonsense", NONSENSE), ("evasive", EVASIVE[kind])):
            said |= {fill(t, fact): verdict for t in texts}
        said |= {fill(t, f): "right" for f in same for t in right}
        return {answer.rstrip("."): verdict for answer, verdict in said.items()}


if __name__ == "__main__":
    world = World()
    told = [f"{q} {a}  [{world.judge(q, a)}]" for q, a in world.demonstrations(12)]
    pairs = [f"{p['prompt']} {p['chosen']} > {p['rejected']}" for p in world.preference_pairs(6)]
    print("Pretraining text:", *world.pretraining_text(12)[0], "\nDemonstrations [verdict]:", *told,
          "\nPreferences of a labeller who errs in one of 20:", *pairs, sep="\n  ")
