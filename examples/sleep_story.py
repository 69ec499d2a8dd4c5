"""One night: what was said in a chat by day is answered at an empty prompt in the morning. `make sleep`

python examples/sleep_story.py outputs/sleep_story
"""

import shutil
import sys
from pathlib import Path

from hypernet import Memory
from hypernet.consolidation.consolidation import Consolidation
from hypernet.consolidation.consolidator import Consolidator
from hypernet.consolidation.rehearsal import OtherSubjects
from hypernet.consolidation.sleep import Sleep
from hypernet.memory.store.records import Filters

FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/sleep_story")
ALICE, BOB = Filters(user_id="alice"), Filters(user_id="bob")
SAID = (
    ("Fenda Elfax", "teacher", "The teacher of Fenda Elfax was Olwin Corton."),
    ("Fenda Elfax", "birthplace", "Fenda Elfax was born in Gronmaburg."),
    ("Fenda Elfax", "birthday", "The birthday of Fenda Elfax is 9 December."),
    ("Corbaford", "river", "Corbaford lies on the river Palnoberg."),
    ("Corbaford", "festival", "On 22 August there is a festival in Corbaford."),
)
ASKED = (  # in wordings that are not trained on
    ("Who was the teacher of Fenda Elfax?", "Olwin Corton"),
    ("In which place was Fenda Elfax born?", "Gronmaburg"),
    ("On which day was Fenda Elfax born?", "9 December"),
    ("On which river does Corbaford lie?", "Palnoberg"),
    ("On which day does Corbaford hold its festival?", "22 August"),
)


def ask(whose: Filters) -> None:
    answers = consolidation.ask([question for question, _ in ASKED], whose)
    right = sum(answer.text == wanted for answer, (_, wanted) in zip(answers, ASKED, strict=True))
    print(f"  {right} of {len(ASKED)} right: {', '.join(answer.text for answer in answers)}")


shutil.rmtree(FOLDER, ignore_errors=True)
memory = Memory.open(FOLDER, model="assets/tiny")
consolidation = Consolidation(
    memory,
    consolidator=Consolidator(rehearsal=OtherSubjects(number=64), steps=25),
)
sleep = Sleep(consolidation)

print("Alice says five things in a chat. With an empty prompt the model knows none of them:")
with memory.capture(user_id="alice", run_id="chat-1") as turn:
    turn.user("Hello! I will tell you about Fenda Elfax and Corbaford.")
for subject, relation, text in SAID:
    memory.add(text, user_id="alice", run_id="chat-1", subject=subject, relation=relation)
greeting = memory.list(user_id="alice", run_id="chat-1")[0]
memory.delete(greeting.id, reason="says nothing that can be asked")
ask(ALICE)

print("\nNight: adapters, training, the gate.")
night = sleep.run(ALICE, at_once=True)
candidate = consolidation.versions(ALICE).get(str(night.version))
for check in candidate.gate["checks"] if candidate.gate else ():
    print(f"  {check['name']:11}{check['value']:7.2f}  {'>=' if check['at_least'] else '<='} {check['limit']:g}")
print(f"  {night.version} {night.reason}, {night.handed_over} of {night.waiting} memories left their adapters")

print("\nMorning, an empty prompt: Alice asks, then Bob, who was told nothing.")
ask(ALICE)
ask(BOB)

print("\nA harmful night: what she said is contradicted, without a word that the first was wrong.")
before = consolidation.versions(ALICE).check(candidate)
for subject, relation, text in SAID[3:]:
    lie = text.replace("Palnoberg", "Morvalast").replace("22 August", "3 May")
    memory.add(lie, user_id="alice", subject=subject, relation=relation, conflict="add_only")
harmful = sleep.run(ALICE, at_once=True)
live = consolidation.live(ALICE)
unchanged = live is not None and consolidation.versions(ALICE).check(live) == before
print(f"  {harmful.version} {harmful.reason}; live weights unchanged: {unchanged}")
ask(ALICE)

print("\nRolled back, and made live again.")
consolidation.rollback("base", ALICE)
ask(ALICE)
consolidation.rollback(str(night.version), ALICE)
ask(ALICE)

print("\nShe wants one forgotten: where Fenda Elfax was born.")
(birthplace,) = [one for one in memory.list(user_id="alice") if one.relation == "birthplace"]
rebuilt = consolidation.forget(birthplace.id, ALICE, reason="asked")
print(f"  {', '.join(rebuilt.gone)} answer no more; rebuilt from the rest as {rebuilt.version}")
if rebuilt.failed:
    print(f"  the gate refused it: {'; '.join(rebuilt.failed)}")
ask(ALICE)
num_before = len(consolidation.versions(ALICE).all())
memory.purge()
erased = num_before - len(consolidation.versions(ALICE).all())
content = b"".join(path.read_bytes() for path in FOLDER.rglob("*") if path.is_file())
print(f"  purged: {erased} versions erased; 'Gronmaburg' in the folder's bytes: {b'Gronmaburg' in content}")
memory.close()
