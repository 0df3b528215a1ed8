"""The tiny checkpoint's world: endless small tool-call tasks, and the bundled samples made of them.

    python data/tiny/make.py                    # the samples, then the checkpoint: 132 minutes in two parts, on one busy core
    python data/tiny/make.py --samples          # writes data/samples/*.json again, the same bytes each time

A task is put together from parts: a tool is a verb and a thing ("get", "hotel review") with a few parameters, each of
a kind (a city, a date, an e-mail address) that has values without end and phrases by which a request mentions them.
There are two splits: "train", and "held_out" for the bundled samples. They share verbs and kinds, but no noun, so no
tool name, and no phrase. Most nouns of the training are random letters: what cannot be known must be copied. A value
stands in the request as it stands in the call, save the flags: a request says them in words ("urgently") and the call
as true or false. Tasks come in the manners of four benchmarks, in their file format.
"""
import argparse
import json
import math
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))           # so that `python data/tiny/make.py` finds the project's own files

from augment import ASK_PAIR, ASK_REQUEST, PAIR_START, pair_prompt, request_text
from data import ASK_CALL, SYSTEM, call_prompt, call_text, parse_sample
from data.calls import required_arguments
from model import ModelConfig, Qwen2, Tokenizer, pad, render
from uncertainty import ANSWER_START

SPLITS = ("train", "held_out")
BENCHES = ("toolalpaca", "sealtool", "apibank", "nexusraven")
SAMPLES, SAMPLES_SEED = 50, 0           # the bundled files: how many samples each, and from which seed

# How hard the tasks are; each is a probability.
SYNONYM = 0.2           # the request has another verb than the tool ("find" for search_hotel)
VAGUE = 0.4             # the request does not say what to do ("see to the hotel review") ...
SAME_THING = 0.2        # a wrong tool does something else with the very same thing (or VAGUE, if that is larger)
SAME_NOUN = 0.2         # ... or has to do with another side of it (hotel price, hotel review)
SAME_DOMAIN = 0.3       # ... or with a neighbour (hotel, flight); else it is of any domain
BY = 0.08               # two tools do the same thing by different parameters (get_hotel_by_city, get_hotel_by_date)
NATURAL = 0.5           # a value is mentioned without its parameter's name ("in Velora", not "with city Velora")
SENTENCE = 0.2          # a value has a sentence of its own
OPTIONAL = 0.4          # a parameter after the first is optional ...
UNSAID = 0.6            # ... and then the request leaves it out
FLAG = 0.08             # a tool has a flag among its parameters
DESCRIBED = 0.05        # a parameter has a description
ODD = 0.7               # a noun, service or phrase of the training split has random letters in it
TWO_CALLS = 0.1         # a request in ToolAlpaca's manner needs two calls
EARLIER_CALL = 0.25     # a dialogue in API-Bank's manner has a call behind it
ASKED_BACK = 0.4        # ... and the assistant asks for the values first

# ------------------------------------------------------------------------------------------------------------- values

ONSETS = "b c d f g h j k l m n p r s t v w z br cl dr fr gl pl st tr".split()


def word(r: random.Random) -> str:
    """A made-up word of two or three syllables: velor, tranisu."""
    syllables = [r.choice(ONSETS) + r.choice("aeiou") for _ in range(r.randint(2, 3))]
    return "".join(syllables) + r.choice(("", "", "", "n", "r", "s", "l", "t"))


PIECES: list[str] = []      # the tokens of small letters, from when there is a tokenizer


def letters(r: random.Random) -> str:
    """A word that nobody knows: random syllables, random letters (about as frequent as in English), or tokens joined at
    random, so that every token is learnt to be copied, also one that real words seldom leave for themselves."""
    kind = r.random()
    if kind < 0.15:
        return word(r)
    if PIECES and kind < 0.75:
        return "".join(r.choice(PIECES) for _ in range(r.randint(2, 3)))
    return "".join(r.choice("eeeeaaaaiiiioooouutttnnnsssrrrlllddhhccmmppggbbfwyvkjxqz") for _ in range(r.randint(4, 10)))


def name(r: random.Random) -> str:
    return word(r).capitalize()


def digits(r: random.Random, low: int, high: int) -> str:
    return "".join(r.choice("0123456789") for _ in range(r.randint(low, high)))


def date(r: random.Random) -> str:
    return f"{r.randint(1990, 2029)}-{r.randint(1, 12):02}-{r.randint(1, 28):02}"


def code(r: random.Random) -> str:
    """An identifier in one of many shapes: 40817, KX204, usr_31, 7f-b2a."""
    return r.choice((digits(r, 3, 6), word(r)[:2].upper() + digits(r, 2, 4), f"{word(r)[:3]}_{digits(r, 1, 3)}",
                     f"{r.randrange(256):x}-{r.randrange(4096):03x}"))


def among(words: str): return lambda r, words=words.split(): r.choice(words)
def whole(low: int, high: int): return lambda r: r.randint(low, high)
def part(low: int, high: int): return lambda r: r.randint(low, high) + r.choice((0.25, 0.5, 0.75))
def address(shape: str): return lambda r: shape.format(word(r), word(r), r.choice(("com", "org", "net", "io")))


KINDS = {   # kind: (JSON type, a value, how a request says it in training | or, in the held-out split, other names)
    "city": ("string", name, "in {}|near {}", "around {}", "town"),
    "country": ("string", among("Brazil Chile China Egypt France Ghana India Italy Japan Kenya Norway Peru Spain"),
                "across {}|inside {}", "throughout {}", "country_name"),
    "date": ("string", date, "on {}|dated {}", "for the day {}", "day"),
    "start_date": ("string", date, "from {}|starting {}", "beginning {}", "from_date"),
    "end_date": ("string", date, "until {}|up to {}", "ending {}", "to_date"),
    "time": ("string", lambda r: f"{r.randint(0, 23):02}:{r.randint(0, 59):02}", "at {}|by {}", "at {} sharp", "hour"),
    "month": ("string", among("January February March April May June July August September October November December"),
              "in {}|during {}", "all through {}", "month_name"),
    "year": ("integer", whole(1950, 2030), "in the year {}|of {}", "back in {}", "calendar_year"),
    "person": ("string", lambda r: f"{name(r)} {name(r)}", "for {}|on behalf of {}", "in the name of {}", "owner"),
    "email": ("string", address("{0}@{1}.{2}"), "at {}|to {}", "reaching {}", "email_address"),
    "phone": ("string", lambda r: "+" + digits(r, 6, 8), "on number {}|calling {}", "via phone {}", "phone_number"),
    "username": ("string", lambda r: word(r) + digits(r, 1, 2), "by user {}|as {}", "under the login {}", "user login"),
    "id": ("string", code, "number {}|with reference {}", "coded {}", ""),
    "language": ("string", among("Arabic Czech Danish Dutch English Finnish Greek Hindi Korean Thai Urdu Welsh Zulu"),
                 "written in {}|translated to {}", "worded in {}", "lang"),
    "currency": ("string", among("AUD BRL CHF CNY EUR GBP INR JPY NOK USD"), "priced in {}|paid in {}", "counted in {}",
                 "currency_code"),
    "amount": ("number", part(2, 900), "worth {}|of {} in total", "amounting to {}", "total"),
    "quantity": ("integer", whole(2, 90), "{} times|{} pieces", "{} units", "count"),
    "limit": ("integer", whole(2, 60), "at most {}|no more than {}", "{} at the maximum", "max_results"),
    "page": ("integer", whole(2, 40), "on page {}|page {}", "turning to page {}", "page_number"),
    "rating": ("integer", whole(1, 5), "rated {}|with {} stars", "of {} star class", "stars"),
    "title": ("string", lambda r: f"{name(r)} {name(r)}", "called '{}'|titled '{}'", "that goes by '{}'", "heading"),
    "message": ("string", lambda r: f"{word(r)} {word(r)} {word(r)}", "saying '{}'|with the text '{}'",
                "that reads '{}'", "content comment"),
    "keyword": ("string", word, "about {}|matching {}", "concerning {}", "query topic"),
    "category": ("string", word, "of type {}|in the {} category", "from the {} group", "genre kind"),
    "color": ("string", among("amber beige black blue brown gold green grey pink red silver teal violet white"),
              "colored {}|in {} color", "painted {}", "shade"),
    "size": ("string", among("tiny small medium large huge"), "in size {}|sized {}", "of {} format", "dimension"),
    "unit": ("string", among("metric imperial celsius kelvin miles meters"), "using {} units|in {} units",
             "measured as {}", "units"),
    "distance": ("number", part(1, 300), "within {} km|{} km away", "{} km around", "radius"),
    "weight": ("number", part(1, 300), "weighing {} kg|of {} kg", "at {} kg", "mass"),
    "duration": ("integer", whole(5, 240), "for {} minutes|lasting {} minutes", "over {} minutes", "minutes"),
    "age": ("integer", whole(1, 99), "aged {}|for age {}", "{} years old", "age_years"),
    "zip": ("string", lambda r: digits(r, 5, 5), "with postcode {}|in zip {}", "at postal code {}", "postal_code"),
    "url": ("string", address("https://{0}.{2}/{1}"), "found at {}|linked from {}", "located at {}", "link"),
    "file": ("string", lambda r: word(r) + r.choice((".pdf", ".csv")), "from file {}|in file {}", "stored as {}",
             "filename"),
    "version": ("string", lambda r: ".".join(digits(r, 3, 3)), "in version {}|version {}", "in release {}", "release"),
    "ip": ("string", lambda r: ".".join(str(r.randint(1, 254)) for _ in range(4)), "at {}|seen on {}", "behind {}",
           "ip_address"),
    "domain": ("string", address("{0}.{2}"), "under {}|on {}", "hosted on {}", "domain_name"),
    "hash": ("string", lambda r: f"{r.randrange(16 ** 8):08x}", "with hash {}|hashed {}", "hashing to {}", "checksum"),
    "cve": ("string", lambda r: f"CVE-{r.randint(2005, 2029)}-{digits(r, 4, 5)}", "for {}|known as {}", "listed as {}",
            "cve_id"),
    "cpe": ("string", address("cpe:{0}:{1}"), "built as {}|for {}", "described by {}", "cpe_name"),
    "severity": ("string", among("low medium high critical"), "of severity {}|ranked {}", "graded {}", "risk_level"),
    "key": ("string", lambda r: word(r) + digits(r, 2, 4), "with my key {}|using key {}", "authorized by {}",
            "api_key"),
}
FLAGS = {   # flag: ((true, false) in training, (true, false) in the held-out split)
    "detailed": (("in detail", "in short"), ("with every detail", "kept short")),
    "urgent": (("urgently", "without urgency"), ("as an urgent matter", "as nothing urgent")),
    "include_archived": (("including archived ones", "excluding archived ones"), ("plus archived", "minus archived")),
    "private": (("privately", "publicly"), ("kept private", "kept public")),
    "active_only": (("only active ones", "even inactive ones"), ("just the active", "also the inactive")),
}
KIND_OF = {alias: kind for kind, row in KINDS.items() for alias in (kind, *row[4].split())}

# -------------------------------------------------------------------------------------------------------------- tools

DOMAINS = {     # domain: (nouns, kinds of parameters that its tools may have beside an id)
    "train": {
        "travel": ("flight hotel cruise hostel visa suitcase ferry resort", "city start_date end_date person currency"),
        "weather": ("storm forecast rainfall wind humidity sunrise snowfall", "city country date unit zip time"),
        "health": ("appointment prescription vaccine symptom allergy clinic", "person date time age city phone"),
        "finance": ("stock bond loan invoice mortgage dividend budget", "currency amount year keyword date person"),
        "music": ("song album concert playlist lyric orchestra singer", "title category year language person rating"),
        "film": ("movie actor trailer cinema sequel director", "title year category language rating city"),
        "food": ("recipe restaurant ingredient dessert soup bakery", "keyword category city rating duration quantity"),
        "sport": ("match team athlete stadium league tournament coach", "title city year date category country"),
        "school": ("course exam teacher lecture homework diploma", "title person start_date language duration year"),
        "work": ("employee meeting salary vacancy shift interview", "person start_date end_date time email title"),
        "shop": ("product order coupon basket discount supplier", "quantity color size amount category email"),
        "mail": ("letter inbox newsletter attachment parcel courier", "email person title message date file"),
        "home": ("lamp heater door alarm camera curtain thermostat", "time color title duration unit quantity"),
        "science": ("planet molecule element galaxy fossil protein", "keyword weight distance unit year page"),
        "animals": ("dog cat horse parrot whale beetle shelter", "color age weight country title size"),
        "transit": ("bus tram garage bridge street taxi tunnel", "city zip time distance phone amount"),
        "code": ("repository branch server database container", "username version title url message"),
        "news": ("article headline journalist magazine podcast", "keyword language country date page limit"),
        "games": ("player quest puzzle arena weapon castle", "username rating quantity title version category"),
    },
    "held_out": {
        "garden": ("tulip lawn greenhouse seedling hedge fountain", "color month size quantity city title"),
        "museum": ("painting sculpture exhibit statue gallery", "title end_date person city category language"),
        "library": ("novel author manuscript shelf poem atlas", "title language year person page keyword"),
        "ocean": ("lighthouse harbor submarine anchor reef sailor", "city distance date country weight phone"),
        "charity": ("donation volunteer fundraiser orphanage sponsor", "amount currency person email date message"),
        "space": ("rocket satellite telescope astronaut comet", "title date unit distance version year"),
    },
}
SECURITY = {    # NexusRaven's world; noun: the kind of its first parameter
    "train": {"domain": "domain", "zone": "domain", "site": "domain", "ip address": "ip", "peer": "ip", "node": "ip",
              "file": "hash", "binary": "hash", "malware": "hash", "vulnerability": "cve", "flaw": "cve", "bug": "cve",
              "product": "cpe", "package": "cpe", "mailbox": "email", "sender": "email", "link": "url", "page": "url"},
    "held_out": {"registrar": "domain", "gateway": "ip", "payload": "hash", "exploit": "cve", "kernel": "cpe",
                 "spammer": "email", "shortcut": "url"},
}
SECURITY_KINDS = "key limit date severity keyword message page version".split()
SERVICES = {"train": "vt abuse shodan net scan intel trace ops".split(), "held_out": "guard sentry radar".split()}
LISTS = {"train": 10 ** 6, "held_out": 10}   # NexusRaven: how many fixed lists of tools its samples share
SECURITY_FACETS = ["", *"report votes comments history score alerts traffic owner".split()]
FACETS = ["", "", "", *"details status history price review summary record photo note policy rule vote label".split()]
VERBS = [       # the words of a line mean the same, and none stands in two lines; a tool has one without a blank
    ["get", "fetch", "retrieve", "show", "pull up"], ["search", "find", "look up", "look for"],
    ["check", "verify", "validate", "look into"], ["create", "make", "add", "set up"], ["share", "publish"],
    ["delete", "remove", "erase", "get rid of"], ["count", "tally"], ["flag", "highlight"], ["archive", "put away"],
    ["track", "follow", "monitor", "keep an eye on"], ["download", "export", "save"],       # these for security, too
    ["update", "change", "modify", "edit"], ["book", "reserve"], ["rename", "relabel"], ["cancel", "call off"],
    ["calculate", "compute", "work out"], ["schedule", "arrange", "plan"], ["send", "forward", "pass on"],
    ["approve", "accept", "sign off"], ["reject", "decline", "turn down"],
]
SECURITY_VERBS = 11     # how many lines of VERBS
GROUP_OF = {verb: group for group, verbs in enumerate(VERBS) for verb in verbs}
TYPES = {       # how a manner writes JSON's types, if otherwise; API-Bank calls nearly everything a string
    "sealtool": {"string": "str", "integer": "int", "number": "float", "boolean": "bool"},
    "apibank": {"string": "str", "integer": "str", "number": "str", "boolean": "bool"},
}
TOOLS = {"toolalpaca": (2, 3), "sealtool": (5,), "apibank": (1, 2, 2, 3), "nexusraven": (3, 4, 5)}
PARAMETERS = {"toolalpaca": (0, 1, 1, 2, 2), "sealtool": (0, 0, 1, 1, 1, 2), "apibank": (1, 1, 2, 2, 3),
              "nexusraven": (1, 1, 1, 2)}


def make_tool(r: random.Random, bench: str, service: str, group: int, thing: str, kinds: list[str], by: str) -> dict:
    """A tool in the manner of `bench`: a verb of the group, done to the thing, with some parameters of these kinds."""
    verb = r.choice([verb for verb in VERBS[group] if " " not in verb])
    words = [verb, *thing.split(), *(["by", *by.split("_")] if by else [])]
    # snake_case in every manner: a noun is then the same token in the request and in the name, and can be copied
    called = "_".join([service, *words] if service else words)
    kinds = [by] if by else kinds[:r.choice(PARAMETERS[bench])]
    kinds = kinds + [r.choice(list(FLAGS))] if r.random() < FLAG else kinds
    parameters, required = {}, []
    for kind in kinds:
        json_type, also = ("boolean", "") if kind in FLAGS else (KINDS[kind][0], KINDS[kind][4])
        label = f"{thing.split()[0]}_id" if kind == "id" else r.choice([kind, *also.split()])
        schema = parameters[label] = {"type": TYPES.get(bench, {}).get(json_type, json_type)}
        if kind not in FLAGS and r.random() < DESCRIBED:
            schema["description"] = f"The {label.replace('_', ' ')}"
        must = len(parameters) == 1 or r.random() >= OPTIONAL
        required += [label] if must else []
        if bench == "nexusraven" or bench == "toolalpaca" and must:
            schema["required"] = must
    description = f"{verb} {r.choice(('', 'the '))}{thing}" + (f" by {by.replace('_', ' ')}" if by else "")
    tool = {"name": called, "description": description.capitalize(), "parameters": parameters}
    return tool | {"required": required} if bench == "sealtool" else tool


def draw_noun(r: random.Random, bench: str, split: str, domain: str) -> tuple[str, list[str]]:
    """A noun and the kinds of parameters its tools have; in NexusRaven's world the first one belongs to the noun."""
    odd = letters(r) if split == "train" and r.random() < ODD else ""
    if bench == "nexusraven":
        noun = r.choice(list(SECURITY[split]))
        return odd or noun, [SECURITY[split][noun], *r.sample(SECURITY_KINDS, 2)]
    nouns, kinds = DOMAINS[split][domain]
    return odd or r.choice(nouns.split()), r.sample(["id", *kinds.split()], 3)


def make_tools(r: random.Random, bench: str, split: str, vague: float) -> list[dict]:
    """The tools of a task, as hard to tell apart as the constants at the top say."""
    same_thing = max(SAME_THING, vague)
    domain, size = r.choice(list(DOMAINS[split])), r.choice(TOOLS[bench])
    service = ""
    if bench == "nexusraven":
        service = letters(r) if split == "train" and r.random() < ODD else r.choice(SERVICES[split])
    noun, kinds = draw_noun(r, bench, split, domain)
    facets, groups = (SECURITY_FACETS, SECURITY_VERBS) if bench == "nexusraven" else (FACETS, len(VERBS))
    facet, group, tools, taken = r.choice(facets), r.randrange(groups), [], set()
    while len(tools) < size:
        thing = f"{noun} {facet}".strip()
        if (group, thing) not in taken:
            taken.add((group, thing))
            bys = kinds[:2] if r.random() < BY and len(tools) + 2 <= size else [""]
            tools += [make_tool(r, bench, service, group, thing, kinds, by) for by in bys]
        near = r.random()               # how near the next tool is to this one
        if near < same_thing or r.random() < 0.5:
            group = r.randrange(groups)
        if near >= same_thing:
            facet = r.choice(facets)
        if near >= same_thing + SAME_NOUN:
            domain = domain if near < same_thing + SAME_NOUN + SAME_DOMAIN else r.choice(list(DOMAINS[split]))
            noun, kinds = draw_noun(r, bench, split, domain)
    r.shuffle(tools)
    return tools


# ----------------------------------------------------------------------------------------------------------- requests

PHRASES = {     # how requests and dialogues are worded; no phrase stands in both splits
    "train": {
        "frame": ("{}.", "{}.", "Please {}.", "Can you {}?", "Could you {} for me?", "I need to {}.", "I want to {}.",
                  "Help me {}.", "I have to {} today.", "Hi, please {} now.", "My boss asked me to {}.", "Let us {}."),
        "thing": ("the {noun} {facet}", "the {facet} of the {noun}", "my {noun} {facet}"),
        "noun": ("the {noun}", "my {noun}"),
        "vague": ("handle", "see to", "deal with", "take care of", "do something about"),
        "value": ("with {label} {value}", "where {label} is {value}", "({label} {value})", "with {value} for {label}"),
        "sentence": ("The {label} is {value}.", "{label}: {value}.", "It has {label} {value}.", "Here {value} is the {label}."),
        "and": (" and ", " and also ", ", then "),
        "sure": ("Sure.", "Of course, one moment.", "Alright, I will do that."),
        "ask": ("Sure. What is the {}?", "I need the {} for that.", "Please tell me the {}."),
        "give": ("The {label} is {value}", "It has {label} {value}", "My {label} is {value}",
                 "{value} is the {label}", "Say {value} for the {label}"),
        "done": ("Done. Anything else?", "That is done.", "It worked."),
    },
    "held_out": {
        "frame": ("Would you {}?", "I'd like you to {}.", "It is time to {}.", "Next, {}, thanks.", "Kindly {}."),
        "thing": ("the {noun}'s {facet}", "our {noun} {facet}"),
        "noun": ("this {noun}", "our {noun}"),
        "vague": ("attend to", "sort out", "go into"),
        "value": ("using {value} as {label}", "having the {label} {value}"),
        "sentence": ("Take {value} as the {label}.", "For the {label} use {value}."),
        "and": (", and after that ", ", plus "),
        "sure": ("Happy to.", "On it."),
        "ask": ("Which {} shall I take?", "Happy to, I only miss the {}."),
        "give": ("Take {value} as the {label}", "Use {value} for the {label}"),
        "done": ("All set. What else?", "That is finished."),
    },
}


class Wording(NamedTuple):
    """How far a request's words are from the tool's; the shares of ..."""
    odd: float = 0.0                # phrases that are garbled
    vague: float = 0.0              # requests that do not say what to do
    synonym: float = SYNONYM        # the others, with any verb that means the same as the tool's


def upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def say(r: random.Random, phrases: Sequence[str], odd: float) -> str:
    """One of the phrases, with the share `odd` of them garbled: what stands around a value must not be needed to copy it."""
    phrase = r.choice(phrases)
    if odd and r.random() < odd:
        phrase = re.sub(r"(?<!{)\b[A-Za-z]+\b(?!})", lambda found: letters(r) if r.random() < 0.5 else found[0], phrase)
    return phrase


def plan(r: random.Random, tool: dict, split: str, words: Wording) -> tuple[str, list[tuple], dict]:
    """What a request for `tool` has to say, read from its JSON alone.

    Returns the deed ("find the hotel's price urgently"), a (label, value, natural phrase) for each value that is
    given, and the arguments of the call that follows from them.
    """
    verb, thing = tool["description"].lower().split(" ", 1)
    thing = thing.removeprefix("the ").split(" by ")[0]
    noun, facet = thing.rsplit(" ", 1) if " " in thing and thing.split()[-1] in FACETS + SECURITY_FACETS else (thing, "")
    if words.vague and r.random() < words.vague:
        verb = say(r, PHRASES[split]["vague"], words.odd)
    elif r.random() < words.synonym:
        verb = r.choice(VERBS[GROUP_OF[verb]])
    deed = f"{verb} " + say(r, PHRASES[split]["thing" if facet else "noun"], words.odd).format(noun=noun, facet=facet)
    held_out, said, arguments = int(split == "held_out"), [], {}
    for i, (key, schema) in enumerate(tool["parameters"].items()):
        if i > 0 and key not in required_arguments(tool) and r.random() < UNSAID:
            continue
        if key in FLAGS:
            arguments[key] = r.random() < 0.5
            deed += " " + FLAGS[key][held_out][0 if arguments[key] else 1]
            continue
        kind = KINDS[KIND_OF.get(key, "id")]
        value = kind[1](r)
        arguments[key] = str(value) if schema["type"] in ("str", "string") else value
        said.append((key.replace("_", " "), value, say(r, kind[2 + held_out].split("|"), words.odd).format(value)))
    return deed, said, arguments


def write_request(r: random.Random, tools: list[dict], split: str, words: Wording = Wording()) -> tuple[str, list[dict]]:
    """One turn of a user that needs one call of each of these tools, and the calls."""
    phrases, deeds, sentences, calls = PHRASES[split], [], [], []
    for tool in tools:
        deed, said, arguments = plan(r, tool, split, words)
        for label, value, natural in r.sample(said, len(said)):
            if len(tools) == 1 and r.random() < SENTENCE:
                sentences.append(upper_first(say(r, phrases["sentence"], words.odd).format(label=label, value=value)))
            elif r.random() < NATURAL:
                deed += " " + natural
            else:
                deed += " " + say(r, phrases["value"], words.odd).format(label=label, value=value)
        deeds.append(deed)
        calls.append({"name": tool["name"], "arguments": arguments})
    request = say(r, phrases["frame"], words.odd).format(say(r, phrases["and"], words.odd).join(deeds))
    return " ".join([upper_first(request), *sentences]), calls


def write_dialogue(r: random.Random, tools: list[dict], split: str, words: Wording) -> tuple[list[dict], list[dict]]:
    """API-Bank's turns up to a call: after one request, or a question back; before them perhaps an earlier call."""
    phrases, turns, tool = PHRASES[split], [], r.choice(tools)
    if r.random() < EARLIER_CALL:
        request, calls = write_request(r, [r.choice(tools)], split, words._replace(vague=0.0))
        turns += [("user", request), ("assistant", f"```{json.dumps(calls)}```"),
                  ("tool", r.choice(("success", "done", code(r)))), ("agent", say(r, phrases["done"], words.odd))]
    deed, said, arguments = plan(r, tool, split, words)
    if said and r.random() < ASKED_BACK:
        calls = [{"name": tool["name"], "arguments": arguments}]
        turns += [("user", upper_first(say(r, phrases["frame"], words.odd).format(deed))),
                  ("agent", say(r, phrases["ask"], words.odd).format(" and ".join(label for label, _, _ in said))),
                  ("user", ". ".join(upper_first(say(r, phrases["give"], words.odd)).format(label=label, value=value)
                                     for label, value, _ in said) + ".")]
    else:
        request, calls = write_request(r, [tool], split, words)
        turns += [("user", request), ("agent", say(r, phrases["sure"], words.odd))][:r.randint(1, 2)]
    turns[-1] = (turns[-1][0], turns[-1][1] + "\nGenerate API Request:")
    return [{"role": role, "content": content} for role, content in turns], calls


# -------------------------------------------------------------------------------------------------------------- tasks

def make_task(r: random.Random, bench: str, split: str, words: Wording = Wording(vague=VAGUE)) -> dict:
    """One item {"query", "tools", "answers"} of a file in the manner of `bench`."""
    of_list = random.Random(f"{split} {r.randrange(LISTS[split])}") if bench == "nexusraven" else r
    tools, words = make_tools(of_list, bench, split, words.vague), words._replace(odd=ODD if split == "train" else 0.0)
    if bench == "apibank":
        query, calls = write_dialogue(r, tools, split, words)
    else:
        two = bench == "toolalpaca" and r.random() < TWO_CALLS
        query, calls = write_request(r, r.sample(tools, 2 if two else 1), split, words)
    return {"query": query, "tools": tools, "answers": seal(calls) if bench == "sealtool" else calls}


def seal(calls: list[dict]) -> list[dict]:
    """Calls in SealTool's own form."""
    return [{"tool": call["name"], "parameters": call["arguments"]} for call in calls]


def generate(bench: str, split: str, seed: int, n: int, words: Wording = Wording(vague=VAGUE)) -> list[dict]:
    """n items of a benchmark's file, determined by the arguments, on every version of Python."""
    if bench not in BENCHES or split not in SPLITS:
        raise ValueError(f"no tasks {bench!r}, {split!r}; there are {', '.join(BENCHES)} and {', '.join(SPLITS)}")
    r = random.Random(f"{bench} {split} {seed}")
    return [make_task(r, bench, split, words) for _ in range(n)]


def similar(item: dict, r: random.Random, split: str = "train", words: Wording = Wording()) -> dict:
    """A new item with the tools of `item` that calls the same ones, with other values in other words.

    Its query is a string in every manner: a request that a model writes is one turn of the user.
    """
    called = [answer.get("name", answer.get("tool")) for answer in item["answers"]]
    tools = {tool["name"]: tool for tool in item["tools"]}
    seen, query = json.dumps(item["query"]).lower(), ""
    while query.lower().rstrip(".?") in seen:
        query, calls = write_request(r, [tools[name] for name in called], split, words)
    return {"query": query, "tools": item["tools"], "answers": seal(calls) if "tool" in item["answers"][0] else calls}


def samples_text(bench: str) -> str:
    """The content of data/samples/<bench>.json: a JSON list with one item a line."""
    items = generate(bench, "held_out", SAMPLES_SEED, SAMPLES)
    return "[\n" + ",\n".join(json.dumps(item) for item in items) + "\n]\n"


# ------------------------------------------------------------------------------------------------------ the checkpoint

CONFIG = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 192,
          "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 6, "num_key_value_heads": 2,
          "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True,
          "torch_dtype": "float32"}
VOCABULARY = 2048
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# A word is split from the blank or quote before it, so a value is the same tokens in the request and in the call: then
# copying it is the plain pattern that a small transformer learns first. Punctuation joins across a blank (`": "`).
SPLIT = r"\p{L}+|\p{N}|(?: ?[^\s\p{L}\p{N}]+)+[\r\n]*|\s*[\r\n]+| |\s+"
BATCH, PROMPT_WEIGHT = 8, 0.5


class Stage(NamedTuple):
    """A part of the training."""
    steps: int
    peak: float                     # learning rate
    words: Wording
    mix: tuple[float, float, float] = (0.75, 0.17, 0.08)        # shares of examples that ask for a call, a request, and both


STAGES = (Stage(9000, 1.5e-3, Wording()), Stage(1500, 5e-4, Wording(vague=VAGUE)),              # first to copy, then to doubt,
          Stage(6000, 1.2e-3, Wording(vague=VAGUE, synonym=0.6), (0.6, 0.28, 0.12)))            # then to choose what is on offer


def phrases() -> list[str]:
    """The template's fixed text, one added token each: five layers should copy values, not spell boilerplate."""
    before, after = SYSTEM.split("{tools}")
    return ["system\n" + before, after, "user\n", "assistant\n", ASK_CALL, ASK_CALL.strip(), ASK_REQUEST,
            ASK_PAIR.removeprefix(ASK_REQUEST), '1. "', '"\n2. "', ANSWER_START, '", "arguments": {', "}}\n</tool_call>",
            '{"name": "', '", "description": "', '", "parameters": {', '": {"type": "', '", "required": true}',
            '", "required": false}', '"}}}', '"}, "', '}, "required": [', "<tool_response>\n", "\n</tool_response>"]


def make_tokenizer(folder: Path, seed: int) -> None:
    """Train the byte-level BPE on prompts and answers of the training split, and write tokenizer.json."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    fixed = re.compile("|".join(re.escape(phrase) for phrase in sorted(phrases(), key=len, reverse=True)))
    texts = []
    for bench in BENCHES:
        for i, item in enumerate(generate(bench, "train", seed, 4000, Wording())):
            sample = parse_sample(item, f"{bench}-{i}", "make.py")
            text = "".join(f"{role}\n{content}" for role, content in render(call_prompt(sample)))
            texts += fixed.split(text + call_text(sample.answers))
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - len(phrases()), special_tokens=list(SPECIAL), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(texts, trainer)
    bpe.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases()])
    bpe.save(str(folder / "tokenizer.json"))
    PIECES[:] = sorted(token for token in bpe.get_vocab() if re.fullmatch("[a-z]{2,6}", token))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, indent=2) + "\n")
    eos = [bpe.token_to_id("<|im_end|>"), bpe.token_to_id("<|endoftext|>")]
    (folder / "config.json").write_text(json.dumps(
        {**CONFIG, "vocab_size": bpe.get_vocab_size(), "eos_token_id": eos}, indent=2) + "\n")


def example(r: random.Random, tokenizer: Tokenizer, stage: Stage) -> tuple[list[int], list[int]]:
    """One training example, (prompt ids, answer ids): a call, a request like another, or such a request and its call."""
    bench = r.choice(BENCHES)
    item = make_task(r, bench, "train", stage.words)
    sample = parse_sample(item, "train", "make.py")
    kind = r.choices(("call", "request", "joint"), stage.mix)[0]
    if kind == "call":
        prompt, answer = tokenizer.chat(call_prompt(sample)), call_text(sample.answers)
    else:
        new = parse_sample(similar(item, r, words=stage.words._replace(vague=0.0)), "train", "make.py")
        prompt = tokenizer.chat(pair_prompt(sample, kind)) + tokenizer.encode(PAIR_START.format(request=request_text(sample)))
        answer = request_text(new) + '"' + ("\n" + call_text(new.answers) if kind == "joint" else "")
    return prompt, [*tokenizer.encode(answer), tokenizer.im_end]


def batches(r: random.Random, tokenizer: Tokenizer, steps: int, stage: Stage) -> Iterator[list[tuple[list[int], list[int]]]]:
    """Batches of examples of about one length each, so that little is padding."""
    for start in range(0, steps, 16):
        pool = sorted((example(r, tokenizer, stage) for _ in range(16 * BATCH)), key=lambda e: len(e[0]) + len(e[1]))
        order = list(range(0, len(pool), BATCH))
        r.shuffle(order)
        yield from [pool[i:i + BATCH] for i in order][:steps - start]


def batch_loss(model: Qwen2, batch: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, float]:
    """The weighted cross-entropy to train on, and that of the answers' tokens alone, in nats a token."""
    ids, _ = pad([prompt + answer for prompt, answer in batch], model.device)       # behind the text: no mask is needed
    weight = torch.zeros(ids.shape)
    for row, (prompt, answer) in enumerate(batch):
        weight[row, :len(prompt)], weight[row, len(prompt):len(prompt) + len(answer)] = PROMPT_WEIGHT, 1.0
    nll = F.cross_entropy(model.logits(model(ids[:, :-1])).flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weight = weight[:, 1:].flatten()
    return (nll * weight).sum() / weight.sum(), nll[weight == 1].mean().item()


def new_model(config: ModelConfig, seed: int) -> Qwen2:
    """Random weights; the layers that add to the residual stream start smaller (GPT-2)."""
    torch.manual_seed(seed)
    model = Qwen2(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.ones_(parameter)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
        else:
            small = (2 * config.num_hidden_layers) ** -0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
            torch.nn.init.normal_(parameter, std=0.05 * small)
    return model


def train(model: Qwen2, tokenizer: Tokenizer, folder: Path, stage: Stage, steps: int, seed: int | str) -> None:
    """One stage: AdamW, linear warm-up over 100 steps, half a cosine to zero. Writes model.safetensors now and then."""
    optimizer = torch.optim.AdamW([{"params": [p for p in model.parameters() if p.dim() == 2], "weight_decay": 0.1},
                                   {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}],
                                  betas=(0.9, 0.98))
    bar = tqdm(batches(random.Random(f"train {seed}"), tokenizer, steps, stage), total=steps, unit="step")
    smooth = None
    for step, batch in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = stage.peak * min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * step / steps)))
        loss, answer_loss = batch_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        smooth = answer_loss if smooth is None else 0.98 * smooth + 0.02 * answer_loss
        bar.set_postfix_str(f"answer loss {smooth:.3f}")
        if step % 200 == 199 or step == steps - 1:
            save_file({name: p.detach() for name, p in model.named_parameters()}, folder / "model.safetensors",
                      metadata={"format": "pt"})


def main(argv: Sequence[str] | None = None) -> None:
    """The program: writes the bundled samples, trains the checkpoint, or both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", action="store_true", help="only write data/samples/<benchmark>.json: "
                        f"{SAMPLES} tasks each, with tools and in phrases that the training never sees")
    parser.add_argument("--train", action="store_true", help="only train the checkpoint")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "tiny", help="the checkpoint's folder (default: data/tiny)")
    parser.add_argument("--steps", type=int, default=10 ** 9, help="at most so many steps a stage, for a quick try")
    parser.add_argument("--seed", type=int, default=0, help="of data and weights (default: 0)")
    args = parser.parse_args(argv)
    if args.samples or not args.train:
        for bench in BENCHES:
            path = ROOT / "data" / "samples" / f"{bench}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(samples_text(bench), encoding="utf-8", newline="\n")
            print(f"{path.relative_to(ROOT)}: {SAMPLES} samples")
    if args.train or not args.samples:
        args.out.mkdir(parents=True, exist_ok=True)
        make_tokenizer(args.out, args.seed)
        tokenizer, model = Tokenizer(args.out), new_model(ModelConfig.from_folder(args.out), args.seed)
        for i, stage in enumerate(STAGES):
            train(model, tokenizer, args.out, stage, min(stage.steps, args.steps), f"{args.seed} {i}" if i else args.seed)
        print(f"{args.out}: {sum(f.stat().st_size for f in args.out.glob('*.*')) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
