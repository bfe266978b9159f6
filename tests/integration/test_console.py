"""The console in a real Chromium, over real processes: what it shows is so, and what it asks for is done.

One learner with a token, one worker, one text and one telemetry stream serve all tests of this file, in their order:
an empty installation, then one that has learned, then one whose learner is gone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from learner.control import ControlAnswer
from stream.events import Label, Prediction, Report, utc_now
from tests.conftest import missing
from tests.deployment import Deployment, label
from tests.integration.probe import FREQUENCIES, STREAM, deployed, publish, store_of, window
from tests.integration.test_http import ask
from tests.kafka import KafkaBroker
from tests.waiting import until

TOKEN = "a-token-of-the-test"
BEARER = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
HOSTILE = "<img src=x onerror=\"document.body.id='hacked'\"><script>document.body.id='hacked'</script>"
SLOW = 120_000
"""Milliseconds: a machine that is busy with something else is no failure."""
PAGES = (
    "#/",
    "#/stream/probe",
    "#/stream/probe/versions",
    "#/stream/probe/labels",
    "#/stream/probe/event/slow-1",
    "#/stream/notes/labels",
    "#/letters",
    "#/audit",
)
PASTE = """(field) => {
    const clipboardData = new DataTransfer();
    clipboardData.setData("text", "x".repeat(5 * 2 ** 20));
    field.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true, cancelable: true }));
}"""
IMAGES = os.environ.get("CONSOLE_IMAGES")
"""A folder for the screenshots of the documents; unset, they are made and thrown away."""


@dataclass
class Site:
    """A console in a browser."""

    deployment: Deployment
    browser: Browser
    asked: set[str] = field(default_factory=set)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.deployment.learner_port}"

    def open(self, route: str = "#/", *, token: bool = True, **context: Any) -> Page:
        """A page in a browser of its own, at a route; with the token given, unless said otherwise."""
        made = self.browser.new_context(**context)
        made.set_default_timeout(SLOW)
        if token:
            made.add_init_script(f"sessionStorage.setItem('trimtab-token', {json.dumps(TOKEN)})")
        page = made.new_page()
        page.on("request", lambda request: self.asked.add(request.url))
        page.on("pageerror", lambda error: pytest.fail(f"the page failed: {error}"))
        page.goto(f"{self.address}/console/{route}")
        expect(page.locator("footer")).to_contain_text("as of", timeout=SLOW)
        return page

    def confirm(self, page: Page, verb: str, why: str = "", who: str = "night shift") -> None:
        """Fill the dialog and confirm."""
        dialog = page.get_by_role("dialog")
        dialog.get_by_label("Why").fill(why)
        dialog.get_by_label("Who asks").fill(who)
        dialog.get_by_role("button", name=verb, exact=True).click()

    def audit(self) -> list[ControlAnswer]:
        """Everything on the topic audit."""
        return [ControlAnswer.model_validate_json(record.value or b"") for record in self.deployment.records("audit")]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """The system's Chromium."""
    path = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    if path is None:
        missing("there is no Chromium here (Debian's package chromium)")
    expect.set_options(timeout=SLOW)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def site(kafka: KafkaBroker, chromium: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A learner that is ready, and no worker yet."""
    directory = tmp_path_factory.mktemp("console")
    (directory / "token").write_text(TOKEN)
    # Everything is asked about that is not nearly the same as what was, so that a test need not wait for a budget.
    asking = {"per_day": 10_000, "novelty": 0.0}
    streams = {
        "probe": {**STREAM, "new_classes": {"per_day": 4}},
        "notes": {"kind": "text", "triggers": {}, "label_requests": asking},
    }
    with deployed(kafka, directory, streams) as made:
        settings = json.dumps({"workers": [f"http://127.0.0.1:{made.worker_port}"]})
        os.environ["TRIMTAB_LEARNER__CONSOLE"] = settings
        os.environ["TRIMTAB_LEARNER__HTTP__TOKEN_FILE"] = str(directory / "token")
        try:
            made.start("learner")
        finally:
            del os.environ["TRIMTAB_LEARNER__CONSOLE"], os.environ["TRIMTAB_LEARNER__HTTP__TOKEN_FILE"]
        until(lambda: made.ready(made.learner_port), seconds=240)
        yield Site(made, chromium)


def test_an_empty_installation_says_what_to_do_first(site: Site) -> None:
    """Whoever opens it on the first day must not take nothing for an error, nor a stopped worker for a quiet one."""
    page = site.open()
    card = page.get_by_role("article").filter(has=page.get_by_role("heading", name="probe"))
    expect(card).to_contain_text("no label has met its answer yet")
    expect(page.get_by_role("region", name="Table of workers")).to_contain_text("stopped")
    page.goto(f"{site.address}/console/#/stream/probe")
    expect(page.locator("main")).to_contain_text("Publish labels, or label an event by hand")
    expect(page.locator("main")).to_contain_text("No fine-tune yet. Press Retrain")
    page.goto(f"{site.address}/console/#/stream/nowhere")
    expect(page.get_by_role("alert")).to_contain_text("'nowhere' is not configured (known: notes, probe)")
    page.go_back()
    expect(page.get_by_role("heading", name="probe", level=1)).to_be_visible()
    page.context.close()


def test_without_the_token_it_shows_and_does_not_act(site: Site) -> None:
    """The page is read by many; what is in an event, and every action, is for those who hold the token."""
    page = site.open("#/stream/probe", token=False)
    expect(page.get_by_role("button", name="Retrain…")).to_be_disabled()
    code, _ = ask(site.deployment.learner_port, "GET", "/console/api/event/probe/slow-0", b"", {})
    assert code == 401
    page.get_by_role("button", name="Give the token to act").click()
    page.get_by_label("Bearer token").fill("wrong")
    page.get_by_role("button", name="Use it").click()
    expect(page.get_by_role("dialog").get_by_role("alert")).to_contain_text("not the token")
    page.get_by_label("Bearer token").fill(TOKEN)
    page.get_by_role("button", name="Use it").click()
    expect(page.get_by_role("button", name="Retrain…")).to_be_enabled()
    page.context.close()


def test_it_shows_what_was_answered_and_how_right_it_was(site: Site) -> None:
    """The numbers on the page are the learner's own, of real answers and real labels."""
    deployment = site.deployment
    deployment.start("worker")
    for part in (range(12), range(12, 30)):
        events = [window("probe", name, number) for name in FREQUENCIES for number in part]
        publish(deployment, events)
        deployment.label(*(label("probe", event.event_id, event.event_id.partition("-")[0]) for event in events))
        until(lambda part=part: deployment.status("probe")["scored"] >= 3 * (part[-1] + 1))  # type: ignore[misc]
    page = site.open("#/stream/probe")
    status = deployment.status("probe")
    expect(page.get_by_role("heading", name="Is it right?").locator("..")).to_contain_text(
        f"{status['accuracy']:.0%} of the last {status['scored']} labelled answers"
    )
    heat = page.get_by_role("region", name="Recall of each class by version")
    expect(heat.get_by_role("row")).to_have_count(1 + len(FREQUENCIES))
    expect(heat).to_contain_text("v1")
    expect(page.locator(".uplot canvas").first).to_be_visible()
    expect(page.locator("main")).to_contain_text("swap: v1: base")
    page.goto(f"{site.address}/console/#/")
    workers = page.get_by_role("region", name="Table of workers")
    expect(workers).to_contain_text("good")
    expect(workers).not_to_contain_text("stopped")
    page.context.close()


def test_an_event_is_labelled_by_hand(site: Site) -> None:
    """Read the newest event, type its class, Enter: the label is on the topic, by whoever said it, and is learned."""
    deployment = site.deployment
    publish(deployment, [window("probe", "fast", 900)])
    until(lambda: "fast-900" in unlabelled(site))
    page = site.open("#/stream/probe/labels")
    page.evaluate("localStorage.setItem('trimtab-who', 'ada')")
    expect(page.get_by_role("heading", name="fast-900")).to_be_visible()
    expect(page.get_by_label("The event", exact=True)).to_contain_text('"channels"')
    expect(page.get_by_label("Its class")).to_be_focused()
    page.keyboard.type("fast")
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_contain_text("1 event labelled 'fast' by ada")
    until(lambda: "fast-900" in learned(deployment))
    said = [Label.model_validate_json(record.value or b"") for record in deployment.records("labels")]
    assert ("fast-900", "fast", "ada") in [(one.event_id, one.label, one.labeller) for one in said]
    until(lambda: any(one.action == "label" and one.who == "ada" for one in site.audit()))
    assert not any("fast-900" in one.message for one in site.audit()), "the audit outlives the event"
    page.context.close()


def test_what_an_event_says_is_text(site: Site) -> None:
    """A report is written by strangers; a script in it would act with the token of whoever looks at it."""
    deployment = site.deployment
    deployment.publish(Report(event_id=HOSTILE, stream="notes", observed_at=utc_now(), text=HOSTILE))
    until(lambda: HOSTILE in unlabelled(site, "notes"))
    page = site.open("#/stream/notes/labels")
    expect(page.get_by_label("The event", exact=True)).to_contain_text("onerror=")
    page.get_by_label("Its class").fill(HOSTILE)
    page.get_by_label("Its class").press("Enter")
    expect(page.get_by_role("status")).to_contain_text("onerror=")
    deployment.label(label("notes", HOSTILE, "<b>bold</b>", labeller=HOSTILE))
    until(lambda: deployment.status("notes")["classes"] >= 1)
    page.goto(f"{site.address}/console/#/stream/notes")
    expect(page.locator("main")).to_contain_text("<b>bold</b>")
    page.goto(f"{site.address}/console/#/audit")
    expect(page.locator("main")).to_contain_text("onerror=")
    page.goto(f"{site.address}/console/#/stream/notes/labels")
    page.get_by_label("Event id").fill(HOSTILE)
    page.get_by_role("button", name="Look").click()
    expect(page.get_by_role("article")).to_contain_text(f"{HOSTILE} said <b>bold</b>")
    page.get_by_role("link", name="Explain").click()
    expect(page.get_by_role("heading", name=f"Event {HOSTILE}")).to_be_visible()
    said = page.get_by_role("region", name="Table: Labels as they came")
    expect(said).to_contain_text("<b>bold</b>")
    expect(page.get_by_role("region", name="Table: Answers")).to_contain_text("predictions")
    assert page.evaluate("document.body.id") == ""
    assert page.locator("main img, main script, main b:text-is('bold')").count() == 0
    page.context.close()


def test_five_megabytes_pasted_into_a_field_are_refused_in_words(site: Site) -> None:
    """A wrong clipboard at night must neither hang the page nor become a class."""
    publish(site.deployment, [window("probe", "slow", 901)])
    until(lambda: "slow-901" in unlabelled(site))
    page = site.open("#/stream/probe/labels")
    box = page.get_by_label("Its class")
    box.evaluate(PASTE)
    expect(page.get_by_role("alert")).to_contain_text("5,242,880 characters were pasted")
    assert box.input_value() == ""
    box.fill("y" * 129)
    box.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("at most 128 characters, and this has 129")
    page.context.close()
    huge = json.dumps({"event_ids": ["slow-901"], "label": "x" * 5 * 2**20}).encode()
    code, body = ask(site.deployment.learner_port, "POST", "/streams/probe/label", huge, BEARER)
    assert (code, "64 KiB" in body["error"]) == (413, True)


def test_a_label_that_is_asked_for_is_given_by_keyboard(site: Site) -> None:
    """A few minutes of a person are worth most on these: in their order, read at once, and gone when said."""
    deployment = site.deployment
    texts = {"hot": f"Pump {HOSTILE} at 90 degrees", "wet": "Water in the cellar", "dark": "The lamps failed"}
    deployment.publish(
        *(Report(event_id=name, stream="notes", observed_at=utc_now(), text=text) for name, text in texts.items())
    )
    until(lambda: set(texts) == set(asked_for(site)))
    first, second, last = asked_for(site)
    page = site.open("#/stream/notes/labels")
    page.get_by_label("Labelled by").fill("grace")
    rows = page.get_by_role("region", name="Open label requests").get_by_role("row")
    expect(rows).to_have_count(4)
    expect(rows.nth(1)).to_contain_text(first)
    expect(rows.nth(1)).to_contain_text("unlike what it knows")
    expect(page.get_by_role("heading", name=first, exact=True)).to_be_visible()
    expect(page.get_by_label("The event", exact=True)).to_have_text(texts[first])
    expect(page.get_by_role("article")).to_contain_text("Its guess is")
    field = page.get_by_label("Its class")
    field.focus()
    # A class that is known, by its first letters and an arrow; then one that nobody named before.
    page.keyboard.type("<B")
    expect(page.get_by_role("option")).to_have_count(1)
    page.keyboard.press("ArrowDown")
    expect(page.get_by_role("option", selected=True)).to_have_text(re.compile("<b>bold</b>"))
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name=second, exact=True)).to_be_visible()
    expect(rows).to_have_count(3)
    expect(field).to_be_focused()
    field.evaluate(PASTE)
    expect(page.get_by_role("alert")).to_contain_text("5,242,880 characters were pasted")
    page.keyboard.type("damage")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name=last, exact=True)).to_be_visible()
    expect(page.get_by_role("status")).to_contain_text("1 event labelled 'damage' by grace")
    until(lambda: asked_for(site) == [last])
    said = [Label.model_validate_json(record.value or b"") for record in deployment.records("labels")]
    by_grace = [(one.event_id, one.label) for one in said if one.labeller == "grace"]
    assert by_grace == [(first, "<b>bold</b>"), (second, "damage")]
    assert page.evaluate("document.body.id") == ""
    page.context.close()


def test_quarantined_labels_are_released_and_dropped(site: Site) -> None:
    """The fifth new class of the day waits for a person; released it is learned, dropped it is gone."""
    deployment = site.deployment
    deployment.label(*(label("probe", f"slow-{n}", f"new class {n}", labeller="intern") for n in range(4)))
    until(lambda: len(waiting(site)) >= 2)
    page = site.open("#/stream/probe/labels")
    released, other = waiting(site)[:2]
    box = page.get_by_role("checkbox", name=f"Choose label {other['id']}", exact=True).element_handle()
    page.get_by_role("checkbox", name=f"Choose label {released['id']}", exact=True).check()
    page.get_by_role("button", name="Release", exact=True).click()
    site.confirm(page, "Release 1 label", "seen by eye")
    expect(page.get_by_role("status")).to_contain_text("1 label released")
    until(lambda: learned(deployment).get(released["event_id"]) == released["label"])
    dropped = waiting(site)[0]
    expect(page.get_by_role("checkbox", name=f"Choose label {released['id']}", exact=True)).to_have_count(0)
    assert box is not None
    assert box.get_attribute("aria-label") == f"Choose label {other['id']}", "another label came under the pointer"
    page.get_by_role("checkbox", name=f"Choose label {dropped['id']}", exact=True).check()
    page.get_by_role("button", name="Drop", exact=True).click()
    expect(page.get_by_role("dialog")).to_contain_text("cannot be undone")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    assert dropped["id"] in {one["id"] for one in waiting(site)}, "who turns back has dropped nothing"
    page.get_by_role("button", name="Drop", exact=True).click()
    site.confirm(page, "Drop 1 label")
    expect(page.get_by_role("status")).to_contain_text("1 label dropped")
    assert dropped["id"] not in {one["id"] for one in waiting(site)}
    page.context.close()


def test_a_dead_letter_is_looked_at_and_sent_again(site: Site) -> None:
    """Its bytes are shown as text, and go to the topic that they came from, untouched."""
    deployment = site.deployment
    bad = json.dumps({"event_id": "torn", "stream": "notes", "observed_at": "today", "text": HOSTILE}).encode()
    topic = deployment.topics.name("reports")
    deployment.kafka.produce(topic, [(b"torn", bad, ())])
    page = site.open("#/letters")
    row = page.get_by_role("row").filter(has_text="torn")
    row.get_by_role("button").click()
    expect(page.get_by_label("The message as it was")).to_contain_text("onerror=")
    page.get_by_role("button", name="Send it again").click()
    site.confirm(page, "Send it again", "settings mended")
    expect(page.get_by_role("status")).to_contain_text(f"1 message sent again, to {topic}")
    until(lambda: [record.value for record in deployment.records("reports")].count(bad) == 2)
    assert page.evaluate("document.body.id") == ""
    page.context.close()


def test_only_what_these_settings_read_is_sent_again(site: Site) -> None:
    """Whoever may write to the dead letters must not write to model-versions by the learner's hand."""
    deployment = site.deployment
    headers = ((b"trimtab-reason", b"torn"), (b"trimtab-topic", deployment.topics.name("model_versions").encode()))
    named = tuple((name.decode(), value) for name, value in headers)
    deployment.kafka.produce(deployment.topics.name("dead_letters"), [(b"x", b"{}", named)])
    record = next(one for one in deployment.records("dead_letters") if one.key == b"x")
    body = json.dumps({"letters": [f"{record.partition}:{record.offset}"]}).encode()
    code, answer = ask(deployment.learner_port, "POST", "/streams/probe/replay", body, BEARER)
    assert code == 409
    assert "do not read" in answer["message"]


def test_learning_is_paused_and_resumed_by_keyboard(site: Site) -> None:
    """A hand on the mouse is not always there: Tab, Enter and Escape do."""
    page = site.open("#/stream/probe")
    button = page.get_by_role("button", name="Pause learning…")
    expect(button).to_be_enabled()
    for _ in range(30):
        page.keyboard.press("Tab")
        if button.evaluate("(its) => its === document.activeElement"):
            break
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog").get_by_label("Why")).to_be_focused()
    page.keyboard.type("looking into it")
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_contain_text("stays in service until learning is resumed")
    assert deployment_paused(site)
    expect(page.get_by_role("heading", name="What is running?").locator("..")).to_contain_text("learning is paused")
    page.get_by_role("button", name="Resume learning…").click()
    site.confirm(page, "Resume")
    until(lambda: not deployment_paused(site))
    page.context.close()


def test_a_retrain_makes_a_version_that_is_promoted_and_rolled_back(site: Site) -> None:
    """The whole steering, by hand: ask, read the exam, promote, roll back; and who came too late is told so."""
    deployment = site.deployment
    page = site.open("#/stream/probe")
    page.get_by_role("button", name="Retrain…").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("Another strategy").click()
    dialog.get_by_label("Strategy").select_option("ewc_replay")
    dialog.get_by_label("Events observed from").fill("2020-03-01T20:00")
    dialog.get_by_label("and before").fill("2020-03-01T21:00")
    site.confirm(page, "What would it do?", "new instrument")
    expect(dialog.get_by_role("status")).to_contain_text("no example in the range")
    dialog.get_by_label("and before").fill("")
    dialog.get_by_role("button", name="What would it do?").click()
    expect(dialog.get_by_role("status")).to_contain_text("ewc_replay on")
    counted = dialog.get_by_role("region", name="Examples by class")
    for name in FREQUENCIES:
        expect(counted.get_by_role("rowheader", name=name, exact=True)).to_be_visible()
    assert [
        one["id"] for one in Axe().run(page).response["violations"] if one["impact"] in ("serious", "critical")
    ] == []
    assert "v2" not in deployment.versions("probe")
    site.confirm(page, "Retrain", "new instrument")
    expect(page.locator(".banners").get_by_role("status")).to_contain_text("✓ Done")
    until(lambda: "v2" in deployment.versions("probe"), seconds=240)
    page.goto(f"{site.address}/console/#/stream/probe/versions")
    page.get_by_role("button", name="Exam of v2").click()
    expect(page.get_by_role("heading", name="v2, from v1")).to_be_visible()
    expect(page.locator("main")).to_contain_text("examples it was never trained on")
    if deployment.status("probe")["version"] != "v2":
        page.get_by_role("button", name="Promote v2").click()
        if deployment.versions("probe")["v2"]["state"] == "refused":
            page.get_by_role("checkbox", name="all the same").check()
        site.confirm(page, "Promote v2", "seen by eye")
        until(lambda: deployment.status("probe")["version"] == "v2")
    publish(deployment, [window("probe", name, 950) for name in FREQUENCIES])
    until(lambda: len(answered_by(deployment, "v2")) >= len(FREQUENCIES))
    # Two people see v2 in service and want to go back from it.
    other = site.open("#/stream/probe/versions")
    for each in (page, other):
        each.get_by_role("button", name="Roll back to v1…").click()
        dialog = each.get_by_role("dialog")
        expect(dialog).to_contain_text("It leaves v2, in service since")
        expect(dialog).to_contain_text(f"It has made {len(answered_by(deployment, 'v2'))} predictions")
        rows = dialog.get_by_role("region", name="Predictions by class").get_by_role("row")
        expect(rows).to_have_count(1 + len({one.label for one in answered_by(deployment, "v2")}))
        expect(dialog.get_by_role("button", name="Roll back to v1")).to_be_enabled()
    site.confirm(page, "Roll back to v1", "it is worse at night", "first")
    expect(page.get_by_role("status").get_by_text("v1")).to_be_visible()
    assert deployment.status("probe")["version"] == "v1"
    site.confirm(other, "Roll back to v1", "so it is", "second")
    expect(other.get_by_role("status")).to_contain_text("▲ Refused")
    expect(other.get_by_role("status")).to_contain_text("rollback by first: it is worse at night")
    until(lambda: {"first", "second"} <= {one.who for one in site.audit() if one.action == "rollback"})
    page.goto(f"{site.address}/console/#/audit")
    row = page.get_by_role("row").filter(has=page.get_by_role("cell", name="first", exact=True))
    expect(row).to_contain_text("it is worse at night")
    for each in (page, other):
        each.context.close()


def test_a_rollback_is_not_held_up_by_what_cannot_be_counted(site: Site) -> None:
    """At night the way back must stay open; and only who may act has a topic read for them."""
    port = site.deployment.learner_port
    code, _ = ask(port, "GET", "/console/api/radius/probe/previous", b"", {})
    assert code == 401
    for target, says in (("v1", "is in service"), ("v1.2", "no version such as"), ("..", "no version such as")):
        code, answer = ask(port, "GET", f"/console/api/radius/probe/{target}", b"", BEARER)
        assert (code, says in answer["error"]) == (404, True), answer
    publish(site.deployment, [window("probe", name, 960) for name in FREQUENCIES])
    until(lambda: {"fast-960"} <= {one.event_id for one in answered_by(site.deployment, "v1")}, seconds=60)
    page = site.open("#/stream/probe")
    page.route("**/console/api/radius/**", lambda route: route.abort())
    page.get_by_role("button", name="Roll back…").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("alert")).to_contain_text("was not counted: the learner does not answer")
    expect(dialog.get_by_role("button", name="Roll back", exact=True)).to_be_enabled()
    page.unroute("**/console/api/radius/**")
    page.keyboard.press("Escape")
    held: list[Route] = []
    page.route("**/console/api/radius/**", lambda route: held.append(route))
    page.get_by_role("button", name="Roll back…").click()
    expect(dialog).to_contain_text("Counting what was answered since")
    expect(dialog.get_by_role("button", name="Roll back", exact=True)).to_be_disabled()
    dialog.get_by_label("Why").press("Enter")
    expect(dialog).to_be_visible()
    held[0].continue_()
    expect(dialog).to_contain_text("back to v2")
    expect(dialog.get_by_role("button", name="Roll back", exact=True)).to_be_enabled()
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_page_keeps_anyone_out(site: Site, scheme: str, tmp_path: Path) -> None:
    """axe-core finds nothing serious, at the width of a phone too; and a phone never scrolls sideways."""
    axe = Axe()
    images = Path(IMAGES) if IMAGES else tmp_path
    for width in (400, 1280):
        page = site.open(color_scheme=scheme, viewport={"width": width, "height": 900})
        for route in PAGES:
            page.goto(f"{site.address}/console/{route}")
            expect(page.get_by_role("heading", level=1)).to_be_visible()
            page.wait_for_load_state("networkidle")
            assert page.evaluate("document.documentElement.scrollWidth") <= width, route
            if (width == 400) == (scheme == "dark"):
                found = [
                    f"{one['id']}: {one['help']}: {[node['html'] for node in one['nodes']][:3]}"
                    for one in axe.run(page).response["violations"]
                    if one["impact"] in ("serious", "critical")
                ]
                assert not found, (route, found)
                if route in ("#/", "#/stream/probe"):
                    name = f"console-{'stream' if route != '#/' else 'overview'}-{scheme}.png"
                    page.screenshot(path=images / name, full_page=route == "#/")
        page.goto(f"{site.address}/console/#/stream/probe")
        page.get_by_role("button", name="Roll back…").click()
        expect(page.get_by_role("dialog").get_by_role("region", name="Predictions by class")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        found = [one["id"] for one in axe.run(page).response["violations"] if one["impact"] in ("serious", "critical")]
        assert not found, ("dialog", found)
        page.screenshot(path=tmp_path / f"rollback-{width}-{scheme}.png")
        page.context.close()


def test_a_page_of_another_site_can_ask_for_nothing(site: Site) -> None:
    """A browser on the operator's machine reaches loopback; a page it happens to have open must not steer a model."""
    port = site.deployment.learner_port
    mine = f"http://127.0.0.1:{port}"
    for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        code, _ = ask(port, "POST", "/streams/probe/pause", b"{}", {**BEARER, **headers})
        assert code == 403, headers
    pages = ("/streams", "/streams/probe", "/streams/probe/classes", "/streams/probe/quarantine", "/metrics")
    for path in ("/console/api/state", *pages):
        for headers in ({"Host": "evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "http://evil.example"}):
            code, _ = ask(port, "GET", path, b"", headers)
            assert code == 403, (path, headers)
        code, _ = ask(port, "GET", path, b"", {"Sec-Fetch-Site": "same-origin"})
        assert code == 200, path
    assert not deployment_paused(site)
    code, _ = ask(
        port, "POST", "/streams/probe/resume", b"{}", {**BEARER, "Origin": mine, "Sec-Fetch-Site": "same-origin"}
    )
    assert code == 202
    for action in ("label", "replay", "retrain", "rollback"):
        code, _ = ask(port, "GET", f"/streams/probe/{action}", b"", BEARER)
        assert code in (404, 405)


def test_the_page_loads_nothing_from_elsewhere(site: Site) -> None:
    """It is opened where there is no other network; and a browser holds it to that."""
    page = site.open()
    answer = page.request.get(f"{site.address}/console/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert site.asked
    assert {re.match(r"https?://[^/]+|data:", url)[0] for url in site.asked} <= {site.address, "data:"}  # type: ignore[index]
    page.context.close()


def test_a_learner_that_is_gone_is_said_to_be_gone(site: Site) -> None:
    """A page that was left open overnight must not show yesterday as now, nor offer to act on it."""
    page = site.open("#/stream/probe")
    expect(page.get_by_role("button", name="Retrain…")).to_be_enabled()
    site.deployment.stop()
    expect(page.get_by_role("alert").first).to_contain_text("No answer from the learner")
    expect(page.get_by_role("alert").first).to_contain_text("What is shown is from")
    expect(page.get_by_role("button", name="Retrain…")).to_be_disabled()
    page.context.close()


def unlabelled(site: Site, stream: str = "probe") -> list[str]:
    """The ids of the newest events without a label."""
    code, rows = ask(site.deployment.learner_port, "GET", f"/console/api/unlabelled/{stream}", b"", BEARER)
    assert code == 200, rows
    return [row["event_id"] for row in rows]


def asked_for(site: Site) -> list[str]:
    """The ids of the events whose label is asked for, as the learner ranks them."""
    code, found = ask(site.deployment.learner_port, "GET", "/console/api/requests/notes", b"", BEARER)
    assert code == 200, found
    return [row["event_id"] for row in found["requests"]]


def waiting(site: Site) -> list[dict[str, Any]]:
    """The labels in quarantine."""
    code, found = ask(site.deployment.learner_port, "GET", "/streams/probe/quarantine", b"", BEARER)
    assert code == 200, found
    rows: list[dict[str, Any]] = found["labels"]
    return rows


def learned(deployment: Deployment, stream: str = "probe") -> dict[str, str]:
    """By event, the label that is learned."""
    with store_of(deployment) as store:
        return {row.event_id: row.label for row in store.examples(stream)}


def answered_by(deployment: Deployment, version: str) -> list[Prediction]:
    """What a version answered of the probe."""
    found = (one for one in deployment.predictions() if one.stream == "probe")
    return [one for one in found if one.model_version.startswith(f"{version}.")]


def deployment_paused(site: Site) -> bool:
    """Whether learning of the probe is paused."""
    return bool(site.deployment.status("probe")["paused"])
