"""One user's memory: told five things, asked, corrected, asked again, one forgotten, with the proof. `make memory`

python examples/memory_story.py outputs/memory_story
"""

import shutil
import sys
from pathlib import Path

from hypernet import Memory

FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/memory_story")
TOLD = (
    ("Fenda Elfax", "teacher", "The teacher of Fenda Elfax was Olwin Corton."),
    ("Fenda Elfax", "birthplace", "Fenda Elfax was born in Gronmaburg."),
    ("Fenda Elfax", "birthday", "The birthday of Fenda Elfax is 9 December."),
    ("Corbaford", "river", "Corbaford lies on the river Palnoberg."),
    ("Corbaford", "festival", "On 22 August there is a festival in Corbaford."),
)
ASKED = (
    ("Who was the teacher of Fenda Elfax?", "Olwin Corton"),
    ("In which place was Fenda Elfax born?", "Gronmaburg"),
    ("When is the birthday of Fenda Elfax?", "9 December"),
    ("On which river does Corbaford lie?", "Palnoberg"),
    ("When is the festival in Corbaford?", "22 August"),
)


def ask(memory: Memory, question: str, **settings: str) -> None:
    for tier in ("none", "token", "adapter"):
        answer = memory.ask(question, user_id="alice", tier=tier, **settings)
        print(f"  {tier:8} {answer.text}")


shutil.rmtree(FOLDER, ignore_errors=True)
memory = Memory.open(FOLDER, model="assets/tiny")

print("Alice tells five things; each becomes text, and an adapter by one forward pass.")
refs = [
    memory.add(text, user_id="alice", subject=subject, relation=relation, valid_at="2026-01-01")
    for subject, relation, text in TOLD
]
written = memory.write_adapters(user_id="alice")
print(f"  {written.written} adapters, {written.bytes:,} bytes, {written.seconds:.1f} s")

print(f"\n{ASKED[0][0]}")
ask(memory, ASKED[0][0])
answer = memory.ask(ASKED[0][0], user_id="alice", tier="adapter")
for effect in memory.explain(answer):
    print(f"  {effect.effect:+7.2f} nats by: {effect.text}")

print("\nEach tier is asked all five questions, the others switched off.")
memory.measure(user_id="alice", questions=ASKED)
for tier, row in memory.status(user_id="alice")["tiers"].items():
    tokens, milliseconds = row["question_tokens"], 1e3 * row["question_s"]
    print(f"  {tier:8} {row['accuracy']:.1f} right, {tokens:.0f} tokens and {milliseconds:.0f} ms a question")
chosen = memory.ask(ASKED[1][0], user_id="alice", accuracy=0.8)
print(f"  auto: {chosen.tier}, {chosen.reason}")

print("\nShe corrects one. The old version still answers for its time.")
memory.update(refs[0], "The teacher of Fenda Elfax was Ilmir Kordale.", valid_at="2026-06-01")
memory.write_adapters(user_id="alice")
for date in ("2026-03-01", "2026-07-01"):
    print(f" as of {date}")
    ask(memory, ASKED[0][0], as_of=date)

print("\nShe wants one forgotten: where Fenda Elfax was born.")
report = memory.forget(refs[1], reason="asked", questions=[ASKED[1]])
print(
    f"  adapters left that are those of a memory that never had it, to the bit: {report.slots_equal} of {report.slots}"
)
for tier, values in report.membership.items():
    print(
        f"  log p of the forgotten answer, {tier}: {values['before']:.1f} before, {values['after']:.1f} after, "
        f"{values['twin']:.1f} where it never was"
    )
print(f"  answers equal: {report.answers_equal} of {report.answers}; {'passed' if report.passed else 'FAILED'}")
ask(memory, ASKED[1][0])

memory.purge()
content = b"".join(path.read_bytes() for path in FOLDER.rglob("*") if path.is_file())
print(f"  'Gronmaburg' in the folder's bytes after purge: {b'Gronmaburg' in content}; verify: {memory.verify()}")
memory.close()
