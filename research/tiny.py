"""The bundled model's world: endless small tool-call tasks, the bundled samples, the training.

    python -m research.tiny --samples       # writes data/samples/*.json again, the same bytes
    python -m research.tiny                 # and trains data/tiny: 97 minutes on one busy core
    python -m research.tiny --out runs/tiny --steps 50                  # a quick try

A task is put together from parts. A tool is a verb and a thing ("get", "hotel review") with a few
parameters, each of a kind (a city, a date), which has values without end and phrases by which a
request mentions them. There are two splits: "train", and "held_out" for the bundled samples. They
share verbs and kinds, but no noun, so no tool name, and no phrase. Most nouns of the training are
random letters: what cannot be known must be copied. A value stands in the request as in the call;
a flag is said in words ("urgently"). Tasks come in the manners and formats of four benchmarks.

The model is made hasty: the requests of its training speak of nearly every optional parameter, so
it makes values up where the bundled samples speak of none. A pair of its own can teach it better.
"""
import argparse
import json
import math
import re
import sys
from collections import namedtuple
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random

if not __package__:
    print("Call it in the project's folder as: python -m research.tiny", file=sys.stderr)
    sys.exit(2)

import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm

from augment import ASK_JOINT, ASK_PAIR, JOINT_START, PAIR_START
from data import ASK_CALL, SYSTEM, Sample, call_prompt, request_text
from data.calls import CALL_START, as_json, call_text, required_arguments
from data.chat import Tokenizer
from data.formats import of_query
from model import ModelConfig, Qwen2

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "data" / "tiny"           # its config.json says what shape the model has
BENCHES = ("toolalpaca", "sealtool", "apibank", "nexusraven")
SAMPLES, SAMPLES_SEED = 50, 0           # of each bundled file

# How hard the tasks are; each is a probability.
SYNONYM = 0.2           # the request has another verb than the tool ("find" for search_hotel)
VAGUE = 0.4             # the request does not say what to do ("see to the hotel review") ...
SAME_THING = 0.2        # a wrong tool does something else with this thing (or VAGUE, if larger)
SAME_NOUN = 0.2         # ... or has to do with another side of it (hotel price, hotel review)
SAME_DOMAIN = 0.3       # ... or with a neighbour (hotel, flight); else it is of any domain
BY = 0.08               # two tools do one thing by other parameters (get_song_by_year, _by_title)
NATURAL = 0.5           # a value is said without its name ("in Velora", not "with city Velora")
SENTENCE = 0.2          # a value has a sentence of its own
OPTIONAL, UNSAID = 0.8, 0.75    # a later parameter is optional, and then the request leaves it out
HASTY = 0.05            # ... but in training: so the model makes one up where nobody spoke of it
FLAG, DESCRIBED = 0.08, 0.05    # a tool has a flag among its parameters; one has a description
ODD = 0.7               # a noun, service or phrase of the training split has random letters in it
TWO_CALLS = 0.1         # a request in ToolAlpaca's manner needs two calls
EARLIER_CALL, ASKED_BACK = 0.25, 0.4    # API-Bank: a call before; values are asked for first


@dataclass(frozen=True)
class Wording:
    """The split, and how far a request's words are from the tool's; the shares of ..."""
    split: str = "train"
    odd: float = 0.0                # phrases that are garbled
    vague: float = 0.0              # requests that do not say what to do
    synonym: float = SYNONYM        # the others, with any verb that means the same as the tool's
    unsaid: float = UNSAID          # optional parameters that the request leaves out
    most: int = 9                   # tools, at most
    pieces: tuple[str, ...] = ()    # tokens to make up words of, from when there is a tokenizer


# --------------------------------------------------------------------------------------- values
ONSETS = "b c d f g h j k l m n p r s t v w z br cl dr fr gl pl st tr".split()
FREQUENT = "eeeeaaaaiiiioooouutttnnnsssrrrlllddhhccmmppggbbfwyvkjxqz"       # as in English, about


def word(r: Random) -> str:
    """A made-up word of two or three syllables: velor, tranisu."""
    syllables = [r.choice(ONSETS) + r.choice("aeiou") for _ in range(r.randint(2, 3))]
    return "".join(syllables) + r.choice(("", "", "", "n", "r", "s", "l", "t"))


def letters(r: Random, words: Wording) -> str:
    """A word that nobody knows: random syllables, random letters, or tokens joined at random, so
    that every token is learnt to be copied, also one that real words seldom leave for itself."""
    kind = r.random()
    if kind < 0.15:
        return word(r)
    if words.pieces and kind < 0.75:
        return "".join(r.choice(words.pieces) for _ in range(r.randint(2, 3)))
    return "".join(r.choice(FREQUENT) for _ in range(r.randint(4, 10)))


def digits(r: Random, low: int, high: int) -> str:
    return "".join(r.choice("0123456789") for _ in range(r.randint(low, high)))


def code(r: Random) -> str:
    """An identifier in one of many shapes: 40817, KX204, usr_31, 7f-b2a."""
    shapes = [digits(r, 3, 6), word(r)[:2].upper() + digits(r, 2, 4)]
    shapes += [f"{word(r)[:3]}_{digits(r, 1, 3)}", f"{r.randrange(256):x}-{r.randrange(4096):03x}"]
    return r.choice(shapes)


def capital(text: str): return text[:1].upper() + text[1:]
def name(r: Random): return capital(word(r))
def names(r: Random): return f"{name(r)} {name(r)}"
def date(r: Random): return f"{r.randint(1990, 2029)}-{r.randint(1, 12):02}-{r.randint(1, 28):02}"
def among(words: str): return lambda r: r.choice(words.split())
def whole(low: int, high: int): return lambda r: r.randint(low, high)
def part(low: int, high: int): return lambda r: r.randint(low, high) + r.choice((0.25, 0.5, 0.75))
def numbered(low: int, high: int): return lambda r: word(r) + digits(r, low, high)
def address(form: str): return lambda r: form.format(word(r), word(r), r.choice(TOP_LEVELS))


TOP_LEVELS = ("com", "org", "net", "io")
COUNTRIES = "Brazil Chile China Egypt France Ghana India Italy Japan Kenya Norway Peru Spain"
MONTHS = "January February March April May June July August September October November December"
LANGUAGES = "Arabic Czech Danish Dutch English Finnish Greek Hindi Korean Thai Urdu Welsh Zulu"
COLORS = "amber beige black blue brown gold green grey pink red silver teal violet white"
# What a parameter may hold: how to draw a value; how a request says it (the value stands last, or
# at {}) in training, parted by |, and in the held-out split; what else the parameter is called.
Kind = namedtuple("Kind", "draw train held_out also", defaults=("",))
KINDS = dict(
    city=Kind(name, "in|near", "around", "town"),
    country=Kind(among(COUNTRIES), "across|inside", "throughout", "country_name"),
    date=Kind(date, "on|dated", "for the day", "day"),
    start_date=Kind(date, "from|starting", "beginning", "from_date"),
    end_date=Kind(date, "until|up to", "ending", "to_date"),
    time=Kind(lambda r: f"{r.randint(0, 23):02}:{r.randint(0, 59):02}", "at|by", "at {} sharp",
              "hour"),
    month=Kind(among(MONTHS), "in|during", "all through", "month_name"),
    year=Kind(whole(1950, 2030), "in the year|of", "back in", "calendar_year"),
    person=Kind(names, "for|on behalf of", "in the name of", "owner"),
    email=Kind(address("{0}@{1}.{2}"), "at|to", "reaching", "email_address"),
    phone=Kind(lambda r: "+" + digits(r, 6, 8), "on number|calling", "via phone", "phone_number"),
    username=Kind(numbered(1, 2), "by user|as", "under the login", "user login"),
    id=Kind(code, "number|with reference", "coded"),
    language=Kind(among(LANGUAGES), "written in|translated to", "worded in", "lang"),
    currency=Kind(among("AUD BRL CHF CNY EUR GBP INR JPY NOK USD"), "priced in|paid in",
                  "counted in", "currency_code"),
    amount=Kind(part(2, 900), "worth|of {} in total", "amounting to", "total"),
    quantity=Kind(whole(2, 90), "{} times|{} pieces", "{} units", "count"),
    limit=Kind(whole(2, 60), "at most|no more than", "{} at the maximum", "max_results"),
    page=Kind(whole(2, 40), "on page|page", "turning to page", "page_number"),
    rating=Kind(whole(1, 5), "rated|with {} stars", "of {} star class", "stars"),
    title=Kind(names, "called '{}'|titled '{}'", "that goes by '{}'", "heading"),
    message=Kind(lambda r: f"{word(r)} {word(r)} {word(r)}", "saying '{}'|with the text '{}'",
                 "that reads '{}'", "content comment"),
    keyword=Kind(word, "about|matching", "concerning", "query topic"),
    category=Kind(word, "of type|in the {} category", "from the {} group", "genre kind"),
    color=Kind(among(COLORS), "colored|in {} color", "painted", "shade"),
    size=Kind(among("tiny small medium large huge"), "in size|sized", "of {} format", "dimension"),
    unit=Kind(among("metric imperial celsius kelvin miles meters"), "using {} units|in {} units",
              "measured as", "units"),
    distance=Kind(part(1, 300), "within {} km|{} km away", "{} km around", "radius"),
    weight=Kind(part(1, 300), "weighing {} kg|of {} kg", "at {} kg", "mass"),
    duration=Kind(whole(5, 240), "for {} minutes|lasting {} minutes", "over {} minutes", "minutes"),
    age=Kind(whole(1, 99), "aged|for age", "{} years old", "age_years"),
    zip=Kind(lambda r: digits(r, 5, 5), "with postcode|in zip", "at postal code", "postal_code"),
    url=Kind(address("https://{0}.{2}/{1}"), "found at|linked from", "located at", "link"),
    file=Kind(lambda r: word(r) + r.choice((".pdf", ".csv")), "from file|in file", "stored as",
              "filename"),
    version=Kind(lambda r: ".".join(digits(r, 3, 3)), "in version|version", "in release",
                 "release"),
    ip=Kind(lambda r: ".".join(str(r.randint(1, 254)) for _ in range(4)), "at|seen on", "behind",
            "ip_address"),
    domain=Kind(address("{0}.{2}"), "under|on", "hosted on", "domain_name"),
    hash=Kind(lambda r: f"{r.randrange(2**32):08x}", "with hash|hashed", "hashing to", "checksum"),
    cve=Kind(lambda r: f"CVE-{r.randint(2005, 2029)}-{digits(r, 4, 5)}", "for|known as",
             "listed as", "cve_id"),
    cpe=Kind(address("cpe:{0}:{1}"), "built as|for", "described by", "cpe_name"),
    severity=Kind(among("low medium high critical"), "of severity|ranked", "graded", "risk_level"),
    key=Kind(numbered(2, 4), "with my key|using key", "authorized by", "api_key"),
)
FLAGS = ("detailed", "urgent", "include_archived", "private", "active_only")
KIND_OF = {label: kind for kind, row in KINDS.items() for label in (kind, *row.also.split())}
JSON = {str: "string", int: "integer", float: "number"}
TYPE_OF = {kind: JSON[type(row.draw(Random(0)))] for kind, row in KINDS.items()}
TYPE_OF |= dict.fromkeys(FLAGS, "boolean")

# ---------------------------------------------------------------------------------------- tools
# A line: nouns, and kinds of parameters that their tools may have beside an id.
DOMAINS = {"train": """
flight hotel cruise hostel visa suitcase ferry resort | city start_date end_date person currency
storm forecast rainfall wind humidity sunrise snowfall | city country date unit zip time
appointment prescription vaccine symptom allergy clinic | person date time age city phone
stock bond loan invoice mortgage dividend budget | currency amount year keyword date person
song album concert playlist lyric orchestra singer | title category year language person rating
movie actor trailer cinema sequel director | title year category language rating city
recipe restaurant ingredient dessert soup bakery | keyword category city rating duration quantity
match team athlete stadium league tournament coach | title city year date category country
course exam teacher lecture homework diploma | title person start_date language duration year
employee meeting salary vacancy shift interview | person start_date end_date time email title
product order coupon basket discount supplier | quantity color size amount category email
letter inbox newsletter attachment parcel courier | email person title message date file
lamp heater door alarm camera curtain thermostat | time color title duration unit quantity
planet molecule element galaxy fossil protein | keyword weight distance unit year page
dog cat horse parrot whale beetle shelter | color age weight country title size
bus tram garage bridge street taxi tunnel | city zip time distance phone amount
repository branch server database container | username version title url message
article headline journalist magazine podcast | keyword language country date page limit
player quest puzzle arena weapon castle | username rating quantity title version category""",
"held_out": """
tulip lawn greenhouse seedling hedge fountain | color month size quantity city title
painting sculpture exhibit statue gallery | title end_date person city category language
novel author manuscript shelf poem atlas | title language year person page keyword
lighthouse harbor submarine anchor reef sailor | city distance date country weight phone
donation volunteer fundraiser orphanage sponsor | amount currency person email date message
rocket satellite telescope astronaut comet | title date unit distance version year"""}
SECURITY = {    # NexusRaven's world; kind of a tool's first parameter: nouns
    "train": {"domain": "domain/zone/site", "ip": "ip address/peer/node",
              "hash": "file/binary/malware", "cve": "vulnerability/flaw/bug",
              "cpe": "product/package", "email": "mailbox/sender", "url": "link/page"},
    "held_out": {"domain": "registrar", "ip": "gateway", "hash": "payload", "cve": "exploit",
                 "cpe": "kernel", "email": "spammer", "url": "shortcut"},
}
SECURITY_KINDS = "key limit date severity keyword message page version".split()
SERVICES = {"train": "vt abuse shodan net scan intel trace ops", "held_out": "guard sentry radar"}
LISTS = {"train": 10 ** 6, "held_out": 10}  # NexusRaven: how many tool lists its samples share
SECURITY_FACETS = ",report,votes,comments,history,score,alerts,traffic,owner".split(",")
FACETS = (",,,details,status,history,price,review,summary,record,photo,note,policy,rule,vote,"
          "label").split(",")
VERBS = [line.split("/") for line in (      # they mean the same; none stands in two lines
    "get/fetch/retrieve/show/pull up", "search/find/look up/look for",
    "check/verify/validate/look into", "create/make/add/set up", "share/publish",
    "delete/remove/erase/get rid of", "count/tally", "flag/highlight", "archive/put away",
    "track/follow/monitor/keep an eye on", "download/export/save", "update/change/modify/edit",
    "book/reserve", "rename/relabel", "cancel/call off", "calculate/compute/work out",
    "schedule/arrange/plan", "send/forward/pass on", "approve/accept/sign off",
    "reject/decline/turn down")]
SECURITY_VERBS = 11     # the first so many of VERBS serve NexusRaven's world, too
GROUP_OF = {verb: group for group, verbs in enumerate(VERBS) for verb in verbs}
# How a manner writes JSON's types; API-Bank calls nearly everything a string.
TYPES = {"sealtool": {"string": "str", "integer": "int", "number": "float", "boolean": "bool"},
         "apibank": {"string": "str", "integer": "str", "number": "str", "boolean": "bool"}}
TOOLS = {"toolalpaca": (2, 3), "sealtool": (5,), "apibank": (1, 2, 2, 3), "nexusraven": (3, 4, 5)}
PARAMETERS = {"toolalpaca": (0, 1, 1, 2), "sealtool": (0, 1, 1, 2), "apibank": (1, 1, 2, 2),
              "nexusraven": (1, 1, 2)}


def make_tool(r: Random, bench: str, service: str, group: int, thing: str, kinds: list[str],
              by: str) -> dict:
    """A tool in the manner of `bench`: a verb of the group, done to the thing, with some
    parameters of these kinds, or with one, `by`."""
    verb = r.choice([verb for verb in VERBS[group] if " " not in verb])
    # snake_case in every manner: a noun is then the same token in the request and in the name
    words = [service, verb, *thing.split(), *(["by", *by.split("_")] if by else [])]
    kinds = [by] if by else kinds[:r.choice(PARAMETERS[bench])]
    kinds = [*kinds, r.choice(FLAGS)] if r.random() < FLAG else kinds
    parameters, required = {}, []
    for kind in kinds:
        labels = [kind, *(KINDS[kind].also.split() if kind in KINDS else [])]
        label = f"{thing.split()[0]}_id" if kind == "id" else r.choice(labels)
        schema = {"type": TYPES.get(bench, {}).get(TYPE_OF[kind], TYPE_OF[kind])}
        if kind in KINDS and r.random() < DESCRIBED:
            schema["description"] = f"The {label.replace('_', ' ')}"
        must = not parameters or r.random() >= OPTIONAL
        if bench == "apibank" and not must:         # its way to say so
            schema["description"] = f"[Optional] The {label.replace('_', ' ')}"
        required += [label] if must else []
        if bench == "nexusraven" or bench == "toolalpaca" and must:
            schema["required"] = must
        parameters[label] = schema
    description = f"{verb} {r.choice(('', 'the '))}{thing}"
    description += f" by {by.replace('_', ' ')}" if by else ""
    tool = {"name": "_".join(filter(None, words)), "description": description.capitalize(),
            "parameters": parameters}
    return tool | {"required": required} if bench == "sealtool" else tool


def draw_noun(r: Random, bench: str, domain: str, words: Wording) -> tuple[str, list[str]]:
    """A noun and the kinds of parameters its tools have; of NexusRaven's the first is its own."""
    odd = letters(r, words) if words.odd and r.random() < words.odd else ""
    if bench == "nexusraven":
        noun, kind = r.choice([(noun, kind) for kind, nouns in SECURITY[words.split].items()
                               for noun in nouns.split("/")])
        return odd or noun, [kind, *r.sample(SECURITY_KINDS, 2)]
    nouns, kinds = domain.split(" | ")
    return odd or r.choice(nouns.split()), r.sample(["id", *kinds.split()], 3)


def make_tools(r: Random, bench: str, words: Wording) -> list[dict]:
    """The tools of a task, as hard to tell apart as the constants at the top say."""
    same_thing, security = max(SAME_THING, words.vague), bench == "nexusraven"
    domains = DOMAINS[words.split].strip().splitlines()
    domain, size = r.choice(domains), min(r.choice(TOOLS[bench]), words.most)
    service = ""
    if security:
        odd = words.odd and r.random() < words.odd
        service = letters(r, words) if odd else r.choice(SERVICES[words.split].split())
    noun, kinds = draw_noun(r, bench, domain, words)
    facets = SECURITY_FACETS if security else FACETS
    groups = SECURITY_VERBS if security else len(VERBS)
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
            domain = domain if near < same_thing + SAME_NOUN + SAME_DOMAIN else r.choice(domains)
            noun, kinds = draw_noun(r, bench, domain, words)
    r.shuffle(tools)
    return tools


# ------------------------------------------------------------------------------------- requests
# No phrase stands in both splits. A flag has one for true and one for false.
PHRASES = {"train": dict(
    frame="{}.|{}.|Please {}.|Can you {}?|Could you {} for me?|I need to {}.|I want to {}.|"
          "Help me {}.|I have to {} today.|Hi, please {} now.|My boss asked me to {}.|Let us {}.",
    thing="the {noun} {facet}|the {facet} of the {noun}|my {noun} {facet}",
    noun="the {noun}|my {noun}", joint=" and | and also |, then ",
    vague="handle|see to|deal with|take care of|do something about",
    value="with {label} {value}|where {label} is {value}|({label} {value})|"
          "with {value} for {label}",
    sentence="The {label} is {value}.|{label}: {value}.|It has {label} {value}.|"
             "Here {value} is the {label}.",
    sure="Sure.|Of course, one moment.|Alright, I will do that.",
    ask="Sure. What is the {}?|I need the {} for that.|Please tell me the {}.",
    give="The {label} is {value}|It has {label} {value}|My {label} is {value}|"
         "{value} is the {label}|Say {value} for the {label}",
    done="Done. Anything else?|That is done.|It worked.",
    detailed="in detail|in short", urgent="urgently|without urgency", private="privately|publicly",
    include_archived="including archived ones|excluding archived ones",
    active_only="only active ones|even inactive ones",
), "held_out": dict(
    frame="Would you {}?|I'd like you to {}.|It is time to {}.|Next, {}, thanks.|Kindly {}.",
    thing="the {noun}'s {facet}|our {noun} {facet}", noun="this {noun}|our {noun}",
    vague="attend to|sort out|go into", joint=", and after that |, plus ",
    value="using {value} as {label}|having the {label} {value}", sure="Happy to.|On it.",
    sentence="Take {value} as the {label}.|For the {label} use {value}.",
    ask="Which {} shall I take?|Happy to, I only miss the {}.",
    give="Take {value} as the {label}|Use {value} for the {label}",
    done="All set. What else?|That is finished.", detailed="with every detail|kept short",
    urgent="as an urgent matter|as nothing urgent", private="kept private|kept public",
    include_archived="plus archived|minus archived",
    active_only="just the active|also the inactive",
)}


def say(r: Random, phrases: str, words: Wording) -> str:
    """One of the phrases, perhaps garbled: what is around a value is not needed to copy it."""
    def garble(found): return letters(r, words) if r.random() < 0.5 else found[0]
    phrase = r.choice(phrases.split("|"))
    odd = words.odd and r.random() < words.odd
    return re.sub(r"(?<!{)\b[A-Za-z]+\b(?!})", garble, phrase) if odd else phrase


def plan(r: Random, tool: dict, words: Wording) -> tuple[str, list[tuple], dict]:
    """What a request for `tool` has to say, read from its JSON alone: the deed ("find the hotel's
    price"); ({"label", "value"}, a phrase without the label) of each argument; the call."""
    phrases = PHRASES[words.split]
    verb, thing = tool["description"].lower().split(" ", 1)
    noun, facet = thing.removeprefix("the ").split(" by ")[0], ""
    if " " in noun and noun.split()[-1] in FACETS + SECURITY_FACETS:
        noun, facet = noun.rsplit(" ", 1)
    if words.vague and r.random() < words.vague:
        verb = say(r, phrases["vague"], words)
    elif r.random() < words.synonym:
        verb = r.choice(VERBS[GROUP_OF[verb]])
    thing = say(r, phrases["thing" if facet else "noun"], words).format(noun=noun, facet=facet)
    deed, said, arguments = f"{verb} {thing}", [], {}
    for i, (key, schema) in enumerate(tool["parameters"].items()):
        if i > 0 and key not in required_arguments(tool) and r.random() < words.unsaid:
            continue
        if key in FLAGS:
            arguments[key] = r.random() < 0.5
            deed += " " + phrases[key].split("|")[0 if arguments[key] else 1]
            continue
        kind = KINDS[KIND_OF.get(key, "id")]
        value = kind.draw(r)
        arguments[key] = str(value) if schema["type"] in ("str", "string") else value
        phrase = say(r, getattr(kind, words.split), words)
        phrase = phrase.format(value) if "{}" in phrase else f"{phrase} {value}"
        said.append(({"label": key.replace("_", " "), "value": value}, phrase))
    return deed, said, {"name": tool["name"], "arguments": arguments}


def write_request(r: Random, tools: list[dict], words: Wording) -> tuple[str, list[dict]]:
    """One turn of a user that needs one call of each of these tools, and the calls."""
    phrases, deeds, sentences, calls = PHRASES[words.split], [], [], []
    for tool in tools:
        deed, said, call = plan(r, tool, words)
        for argument, phrase in r.sample(said, len(said)):
            if len(tools) == 1 and r.random() < SENTENCE:
                sentences.append(capital(say(r, phrases["sentence"], words).format(**argument)))
            elif r.random() < NATURAL:
                deed += " " + phrase
            else:
                deed += " " + say(r, phrases["value"], words).format(**argument)
        deeds.append(deed)
        calls.append(call)
    frame = say(r, phrases["frame"], words)
    request = frame.format(say(r, phrases["joint"], words).join(deeds))
    return " ".join([capital(request), *sentences]), calls


def write_dialogue(r: Random, tools: list[dict], words: Wording) -> tuple[list[dict], list[dict]]:
    """API-Bank's turns up to a call: perhaps an earlier call, then a request, perhaps in parts."""
    phrases, turns, tool = PHRASES[words.split], [], r.choice(tools)
    if r.random() < EARLIER_CALL:
        request, calls = write_request(r, [r.choice(tools)], replace(words, vague=0.0))
        turns += [("user", request), ("assistant", f"```{json.dumps(calls)}```"),
                  ("tool", r.choice(("success", "done", code(r)))),
                  ("agent", say(r, phrases["done"], words))]
    deed, said, call = plan(r, tool, words)
    if said and r.random() < ASKED_BACK:
        calls, labels = [call], " and ".join(argument["label"] for argument, _ in said)
        turns += [("user", capital(say(r, phrases["frame"], words).format(deed))),
                  ("agent", say(r, phrases["ask"], words).format(labels))]
        given = [capital(say(r, phrases["give"], words)).format(**one) for one, _ in said]
        turns.append(("user", ". ".join(given) + "."))
    else:
        request, calls = write_request(r, [tool], words)
        last = [("user", request), ("agent", say(r, phrases["sure"], words))]
        turns += last[:r.randint(1, 2)]
    messages = [{"role": role, "content": content} for role, content in turns]
    messages[-1]["content"] += "\nGenerate API Request:"
    return messages, calls


def sealtools_form(calls: list[dict]) -> list[dict]:
    return [{"tool": call["name"], "parameters": call["arguments"]} for call in calls]


def make_task(r: Random, bench: str, words: Wording) -> dict:
    """One item {"query", "tools", "answers"} of a file in the manner of `bench`."""
    words, of_list = replace(words, odd=ODD if words.split == "train" else 0.0), r
    if bench == "nexusraven":
        of_list = Random(f"{words.split} {r.randrange(LISTS[words.split])}")
    tools = make_tools(of_list, bench, words)
    if bench == "apibank":
        query, calls = write_dialogue(r, tools, words)
    else:
        two = bench == "toolalpaca" and r.random() < TWO_CALLS
        query, calls = write_request(r, r.sample(tools, 2 if two else 1), words)
    calls = sealtools_form(calls) if bench == "sealtool" else calls
    return {"query": query, "tools": tools, "answers": calls}


def generate(bench: str, split: str, seed: int, n: int, vague: float = VAGUE) -> list[dict]:
    """n items of a benchmark's file, determined by the arguments, on every version of Python."""
    r, words = Random(f"{bench} {split} {seed}"), Wording(split, vague=vague)
    return [make_task(r, bench, words) for _ in range(n)]


def similar(item: dict, r: Random, words: Wording = Wording()) -> dict:
    """A new item with the tools of `item` that calls the same ones, with other values in other
    words. Its query is a string in every manner: what a model writes is one turn of the user."""
    sealed = "tool" in item["answers"][0]
    called = [answer["tool" if sealed else "name"] for answer in item["answers"]]
    tools = {tool["name"]: tool for tool in item["tools"]}
    seen, query = json.dumps(item["query"]).lower(), ""
    while query.lower().rstrip(".?") in seen:
        query, calls = write_request(r, [tools[name] for name in called], words)
    calls = sealtools_form(calls) if sealed else calls
    return {"query": query, "tools": item["tools"], "answers": calls}


# ------------------------------------------------------------------------------------ the model
# A word is split from the blank or quote before it, so a value is the same tokens in the request
# and in the call: to copy it is the plain pattern that a small transformer learns first.
SPLIT = r"\p{L}+|\p{N}|(?: ?[^\s\p{L}\p{N}]+)+[\r\n]*|\s*[\r\n]+| |\s+"
BATCH, PROMPT_WEIGHT = 8, 0.5
Example = tuple[list[int], list[int]]       # ids of a prompt and of its answer


@dataclass(frozen=True)
class Stage:
    """A part of the training."""
    steps: int
    peak: float                             # learning rate
    words: Wording
    mix: tuple[float, ...] = (0.83, 0.13, 0.04)     # shares that ask for a call, a pair, joint


STAGES = (Stage(4000, 1.5e-3, Wording(unsaid=HASTY, most=2)),   # first to copy, from short prompts,
          Stage(800, 7e-4, Wording(unsaid=HASTY, vague=VAGUE)),            # then to doubt,
          Stage(2000, 1.2e-3, Wording(unsaid=HASTY, vague=VAGUE, synonym=0.6),      # then to choose
                (0.68, 0.26, 0.06)))


def fixed_text() -> list[str]:
    """The template's text, one added token each: five layers should copy values, not spell it."""
    before, after = SYSTEM.split("{tools}")
    return ["system\n" + before, after, "user\n", "assistant\n", ASK_CALL, ASK_CALL.strip(),
            ASK_PAIR, ASK_JOINT, '1. "', '"\n2. "', '1. {"name": "', '"\n2. {"name": "', '}}\n"',
            CALL_START, '", "arguments": {', "}}\n</tool_call>", '{"name": "',
            '", "description": "', '", "parameters": {', '": {"type": "', '", "required": true}',
            '", "required": false}', '"}}}', '"}, "', '}, "required": [', "<tool_response>\n",
            "\n</tool_response>"]


def sample_of(item: dict) -> Sample:
    """A task as the loaders read it from a file."""
    read = of_query(item)
    return Sample("train", read.messages, read.tools, read.answers)


def make_tokenizer(folder: Path, vocabulary: int, seed: int) -> Tokenizer:
    """Train the byte-level BPE on prompts and answers; the folder has its config.json."""
    longest_first = sorted(fixed_text(), key=len, reverse=True)
    fixed, texts = re.compile("|".join(re.escape(text) for text in longest_first)), []
    for bench in BENCHES:
        for item in generate(bench, "train", seed, 4000, vague=0.0):
            sample = sample_of(item)
            prompt = "".join(f"{m['role']}\n{m['content']}" for m in call_prompt(sample))
            texts += fixed.split(prompt + call_text(sample.answers))
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.normalizer, bpe.decoder = normalizers.NFC(), decoders.ByteLevel()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocabulary - len(fixed_text()), show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.add_tokens([AddedToken(text, normalized=False) for text in fixed_text()])
    bpe.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


def example(r: Random, tokenizer: Tokenizer, stage: Stage, words: Wording) -> Example:
    """One training example: a call; or a pair like another, call first, or request first."""
    item = make_task(r, r.choice(BENCHES), words)
    sample = sample_of(item)
    chat, kind = call_prompt(sample), r.choices(("call", "pair", "joint"), stage.mix)[0]
    if kind == "call":
        answer = call_text(sample.answers)
    else:
        calls = item["answers"][:1] if kind == "pair" else item["answers"]
        like = similar({**item, "answers": calls}, r, replace(words, vague=0.0, unsaid=UNSAID))
        new, request = sample_of(like), request_text(sample)
        if kind == "pair":
            ask, begun = ASK_PAIR, '{"name": "'
            call = as_json(asdict(sample.answers[0]))
            start = PAIR_START.format(call=call, request=as_json(request)) + begun
            new_call = as_json(asdict(new.answers[0])).removeprefix(begun)
            answer = f"{new_call}\n{as_json(request_text(new))}"
        else:
            ask, start = ASK_JOINT, JOINT_START.format(request=request)
            answer = f'{request_text(new)}"\n{call_text(new.answers)}'
        chat = [chat[0], {"role": "user", "content": ask}, {"role": "assistant", "content": start}]
    system, rest = tokenizer.chat(chat)
    return system + rest, [*tokenizer.encode(answer), tokenizer.im_end]


def batches(tokenizer: Tokenizer, stage: Stage, seed: str) -> Iterator[list[Example]]:
    """A stage's batches of examples, of about one length each, so that little is padding."""
    pieces = sorted(t for t in tokenizer.bpe.get_vocab() if re.fullmatch("[a-z]{2,6}", t))
    r, words = Random(f"train {seed}"), replace(stage.words, pieces=tuple(pieces))
    for start in range(0, stage.steps, 16):
        pool = [example(r, tokenizer, stage, words) for _ in range(16 * BATCH)]
        pool.sort(key=lambda e: len(e[0]) + len(e[1]))
        order = list(range(0, len(pool), BATCH))
        r.shuffle(order)
        yield from [pool[i:i + BATCH] for i in order][:stage.steps - start]


def batch_loss(model: Qwen2, batch: list[Example]) -> tuple[torch.Tensor, float]:
    """The weighted loss to train on, and that of the answers' tokens alone, nats a token."""
    # padding is behind the text, where no token sees it: it need be no hole, and there is no mask
    ids = torch.zeros(len(batch), max(len(prompt) + len(answer) for prompt, answer in batch)).long()
    weight = torch.zeros(ids.shape)
    for row, own, (prompt, answer) in zip(ids, weight, batch):
        row[:len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        own[:len(prompt)] = PROMPT_WEIGHT
        own[len(prompt):len(prompt) + len(answer)] = 1.0
    logits, weight = model.lm_head(model(ids[:, :-1])).float(), weight[:, 1:].flatten()
    nll = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (nll * weight).sum() / weight.sum(), nll[weight == 1].mean().item()


def new_model(config: ModelConfig, seed: int) -> Qwen2:
    """Random weights; the layers that add to the residual stream start smaller (GPT-2)."""
    torch.manual_seed(seed)
    model = Qwen2(config)
    for name, parameter in model.named_parameters():
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        small = (2 * config.num_hidden_layers) ** -0.5 if residual else 1
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.05 * small)
        else:
            torch.nn.init.constant_(parameter, 1 if "norm" in name else 0)
    return model


def fit(model: Qwen2, tokenizer: Tokenizer, folder: Path, stage: Stage, seed: str) -> list[float]:
    """One stage: AdamW, linear warm-up over 100 steps, half a cosine to zero. Writes
    model.safetensors; gives the answers' loss at each step, nats a token."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1},
                                   {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.98))
    losses, bar = [], tqdm(batches(tokenizer, stage, seed), total=stage.steps, unit="step")
    for step, batch in enumerate(bar, 1):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 1) / stage.steps))
        for group in optimizer.param_groups:
            group["lr"] = stage.peak * min(step / 100, cosine)
        loss, answer_loss = batch_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(answer_loss)
        bar.set_postfix_str(f"answer loss {answer_loss:.3f}")
    weights = {name: p.detach() for name, p in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return losses


def main(argv: Sequence[str] | None = None) -> None:
    """The program: writes the bundled samples, and trains the model."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--samples", action="store_true", help="only write data/samples/*.json")
    parser.add_argument("--out", type=Path, default=TINY, help="the model's folder (data/tiny)")
    parser.add_argument("--steps", type=int, default=10 ** 9, help="at most so many a stage")
    parser.add_argument("--seed", type=int, default=0, help="of data and weights (0)")
    args = parser.parse_args(argv)
    for bench in BENCHES:
        lines = [json.dumps(x) for x in generate(bench, "held_out", SAMPLES_SEED, SAMPLES)]
        path = ROOT / "data" / "samples" / f"{bench}.json"
        path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8", newline="\n")
        print(f"{path.relative_to(ROOT)}: {SAMPLES} samples")
    if args.samples:
        return
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer_config.json"):
        (args.out / name).write_bytes((TINY / name).read_bytes())
    config = ModelConfig.from_folder(args.out)
    tokenizer = make_tokenizer(args.out, config.vocab_size, args.seed)
    model = new_model(config, args.seed)
    for i, stage in enumerate(STAGES):
        stage = replace(stage, steps=min(stage.steps, args.steps))
        fit(model, tokenizer, args.out, stage, f"{args.seed} {i}" if i else f"{args.seed}")


if __name__ == "__main__":
    main()
