"""Writes are whole or not at all, whoever else writes and whatever killed processes left; an output has one writer."""

import errno
import json
import os
import select
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from qat.cli.failures import one_line_of
from qat.core import locks
from qat.core.errors import UserError
from qat.core.files import (
    atomic_directory,
    atomic_path,
    atomic_set,
    check_same_run,
    read_json,
    restore,
    sha256,
    write_json,
    write_text,
)
from qat.core.locks import clear_leftovers, one_writer, only_writer
from tests.messages import refused

ROOT = Path(__file__).resolve().parents[2]


def script(text, *args, **options):
    """Starts a process that runs it; it says something when it has come to where the test wants it."""
    command = [sys.executable, "-c", textwrap.dedent(text), *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def killed(text, *args):
    """Runs it until it says something, and kills it there."""
    process = script(text, *args)
    assert process.stdout.readline(), process.stderr.read()
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_a_failed_write_leaves_the_earlier_file(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("before")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "out"
    for text in ("one", "two"):
        with atomic_directory(target) as folder:
            (folder / f"{text}.txt").write_text(text)
    assert [path.name for path in target.iterdir()] == ["two.txt"]
    with pytest.raises(RuntimeError), atomic_directory(target) as folder:
        (folder / "three.txt").write_text("3")
        raise RuntimeError
    assert [path.name for path in target.iterdir()] == ["two.txt"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write here"), atomic_path(tmp_path / "file" / "x"):
        pass


def test_json_round_trip_and_damage(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1, 2.5]})
    assert read_json(tmp_path / "a.json") == {"x": [1, 2.5]}
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path / "b.json")


def test_sha256_of_nothing(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    assert sha256(tmp_path / "empty").startswith("e3b0c44298fc1c14")


WRITE = """
    import sys, time
    from qat.core.files import atomic_directory, atomic_path
    with atomic_path(sys.argv[1] + "/a.txt") as file, atomic_directory(sys.argv[1] + "/out") as folder:
        file.write_text("half")
        (folder / "b.txt").write_text("half")
        print("here", flush=True)
        time.sleep(60)
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_process_left_goes_with_the_next_write_and_what_a_living_one_has_stays(tmp_path):
    (tmp_path / "a.txt").write_text("before")
    (tmp_path / ".notes.tmp").write_text("somebody else's")
    killed(WRITE, tmp_path)
    assert len(names(tmp_path)) == 5  # two temporaries and a lock
    assert (tmp_path / "a.txt").read_text() == "before"
    write_text(tmp_path / "c.txt", "")
    assert names(tmp_path) == [".notes.tmp", ".out.bevqat.lock", "a.txt", "c.txt"]
    with atomic_directory(tmp_path / "out"):
        pass
    assert names(tmp_path) == [".notes.tmp", "a.txt", "c.txt", "out"]
    living = script(WRITE, tmp_path)
    assert living.stdout.readline(), living.stderr.read()
    at_work = names(tmp_path)
    clear_leftovers(tmp_path, again=True)
    assert names(tmp_path) == at_work and len(at_work) == 7
    living.kill()
    living.communicate()
    clear_leftovers(tmp_path, again=True)
    assert names(tmp_path) == [".notes.tmp", ".out.bevqat.lock", "a.txt", "c.txt", "out"]


BETWEEN = """
    import os, sys, time
    from qat.core.files import atomic_directory

    def look(event, args):
        if event == "os.rename" and os.fspath(args[0]).endswith(".bevqat.tmp"):
            print("here", flush=True)
            time.sleep(60)

    sys.addaudithook(look)
    with atomic_directory(sys.argv[1]) as folder:
        (folder / "a.txt").write_text("new")
"""


@pytest.mark.parametrize("then", ["read", "written"])
def test_a_folder_that_was_moved_aside_and_not_replaced_comes_back_or_goes(tmp_path, then):
    """Killed between the two renames."""
    target = tmp_path / "out"
    with atomic_directory(target) as folder:
        (folder / "a.txt").write_text("old")
    killed(BETWEEN, target)
    assert not target.exists() and (tmp_path / ".out.bevqat.old" / "a.txt").read_text() == "old"
    if then == "read":
        restore(target)
        assert (target / "a.txt").read_text() == "old"
    with pytest.raises(RuntimeError), atomic_directory(target) as folder:
        assert (target / "a.txt").read_text() == "old"
        raise RuntimeError
    assert (target / "a.txt").read_text() == "old" and names(tmp_path) == ["out"]
    (tmp_path / ".out.bevqat.old").mkdir()  # killed after them
    with atomic_directory(target) as folder:
        (folder / "a.txt").write_text("new")
    assert (target / "a.txt").read_text() == "new" and names(tmp_path) == ["out"]


def test_a_folder_that_is_being_replaced_is_not_put_back_by_a_reader(tmp_path):
    target = tmp_path / "out"
    with atomic_directory(target):
        pass
    writer = script(BETWEEN, target)
    assert writer.stdout.readline(), writer.stderr.read()
    restore(target)
    assert not target.exists() and ".out.bevqat.old" in names(tmp_path)
    writer.kill()
    writer.communicate()


def test_a_link_to_a_folder_is_followed_and_a_file_is_no_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with atomic_directory(tmp_path / "link") as folder:
        (folder / "a.txt").write_text("new")
    assert (tmp_path / "real" / "a.txt").read_text() == "new" and (tmp_path / "link").is_symlink()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: found a file"), atomic_directory(tmp_path / "file"):
        pass


SET = """
    import json, sys
    from pathlib import Path
    from qat.core.files import atomic_set

    targets = [Path(sys.argv[1]) / name for name in ("a.json", "a.png", "a.csv")]

    def write(number):
        with atomic_set(*targets) as stage:
            for path in targets:
                (stage / path.name).write_text(number)

    def look(event, args):
        if event in ("os.rename", "os.remove"):
            print(json.dumps({path.name: path.read_text() for path in targets if path.exists()}))

    write("1")
    sys.addaudithook(look)
    write("2")
"""


def test_no_file_lies_beside_a_result_that_it_was_not_made_from(tmp_path):
    """At every moment of replacing them: before each call that changes a name."""
    said, problem = script(SET, tmp_path).communicate()
    seen = [json.loads(line) for line in said.splitlines()]
    assert {"a.json": "1"} in seen and {"a.json": "2"} in seen, problem
    assert all(len(set(state.values())) == 1 and "a.json" in state for state in seen)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        ("a.json", "a.png", "a.csv"), "2"
    )


def test_of_files_that_belong_together_a_failed_write_leaves_all_and_one_that_is_not_written_again_goes(tmp_path):
    targets = [tmp_path / name for name in ("a.json", "a.png", "a.csv")]
    for path in targets:
        path.write_text("1")
    with pytest.raises(RuntimeError), atomic_set(*targets) as stage:
        (stage / "a.json").write_text("2")
        raise RuntimeError
    assert [path.read_text() for path in targets] == ["1", "1", "1"]
    with atomic_set(*targets) as stage:
        (stage / "a.json").write_text("2")
        (stage / "a.csv").write_text("2")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.json": "2", "a.csv": "2"}


def test_a_full_disk_is_named_and_the_earlier_file_stays(tmp_path):
    """A limit on the size of a file stands for it."""
    (tmp_path / "a.txt").write_text("before")
    code = """
        import resource, sys
        from qat.core.errors import UserError
        from qat.core.files import atomic_path
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            with atomic_path(sys.argv[1]) as temporary:
                temporary.write_bytes(bytes(2000))
        except UserError as error:
            print(error)
    """
    said, problem = script(code, tmp_path / "a.txt").communicate()
    assert said == f"{tmp_path / 'a.txt'}: cannot write here: File too large\n", problem
    assert (tmp_path / "a.txt").read_text() == "before" and names(tmp_path) == ["a.txt"]


def test_what_cannot_be_written_is_named_by_its_output_and_not_by_a_temporary_name(tmp_path):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for what in (
        lambda: atomic_set(tmp_path / "a.json", tmp_path / "a.csv"),
        lambda: atomic_directory(tmp_path / "a.json"),
    ):
        with pytest.raises(UserError) as caught, what() as stage, atomic_path(stage / "a.csv"):
            raise full
        assert str(caught.value) == f"{tmp_path / 'a.json'}: cannot write here: {os.strerror(errno.ENOSPC)}"
    with atomic_directory(tmp_path / "a.json") as temporary:
        line = one_line_of(OSError(errno.ENOSPC, "full", str(temporary / "x.onnx")))
    assert line is not None and line.startswith(f"{tmp_path / 'a.json'}: found ")


HOLD = """
    import sys, time
    from qat.core.locks import only_writer
    with only_writer(sys.argv[1], inside=len(sys.argv) > 2):
        print("here", flush=True)
        sys.stdin.readline()
"""


@pytest.mark.parametrize("inside", [False, True])
def test_a_second_writer_is_told_who_the_first_is_until_that_one_ends(tmp_path, inside):
    target = tmp_path / "runs" / "out"
    first = script(HOLD, target, *(["inside"] if inside else []), stdin=subprocess.PIPE)
    assert first.stdout.readline(), first.stderr.read()
    told = rf"out: process {first.pid} on .+ \(-c .+, since \d{{4}}-.+\) is writing here; wait until it ends"
    with pytest.raises(UserError, match=told) as caught, only_writer(target, inside):
        pass
    assert "\n" not in str(caught.value)
    first.communicate("\n")
    assert first.returncode == 0 and names(tmp_path) == []
    killed(HOLD, target, *(["inside"] if inside else []))
    with only_writer(target, inside), only_writer(target, inside):  # the same thread may ask again
        assert target.parent.exists()
        failed = []

        def other():
            try:
                with only_writer(target, inside):
                    pass
            except UserError as error:
                failed.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert f"process {os.getpid()} on" in failed[0]
    assert not any(tmp_path.rglob(".*"))


@pytest.mark.parametrize("late", [0.0, 1.5], ids=["at once", "late"])
def test_a_fork_does_not_keep_its_parents_lock(tmp_path, late):
    """A forked child has the lock's descriptor until it first runs: the parent may be killed before that. "late" makes that
    time as long as a loaded machine does."""
    code = """
        import os, sys, time
        os.register_at_fork(after_in_child=lambda: time.sleep(float(sys.argv[2])))  # before qat's: hooks run in order
        from qat.core.locks import only_writer
        with only_writer(sys.argv[1]):
            if os.fork() == 0:
                time.sleep(60)
            print("here", flush=True)
            time.sleep(60)
    """
    process = script(code, tmp_path / "out", str(late), start_new_session=True)
    assert process.stdout.readline(), process.stderr.read()
    process.kill()
    process.wait()
    try:
        with only_writer(tmp_path / "out"):
            pass
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert names(tmp_path) == []


@pytest.mark.parametrize("signature", ["", '{"pid": 1', "[]"])
def test_a_lock_whose_holder_has_not_signed_it_is_refused_all_the_same(tmp_path, monkeypatch, signature):
    monkeypatch.setattr(locks, "PASSING_SECONDS", 0.3)
    fcntl = pytest.importorskip("fcntl")
    path = tmp_path / ".out.bevqat.lock"
    path.write_text(signature)
    with path.open("r+") as kept:
        fcntl.flock(kept, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="out: another process is writing here"), only_writer(tmp_path / "out"):
            pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_where_the_file_system_has_no_locks_an_output_is_written_without(tmp_path, monkeypatch, number):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with only_writer(tmp_path / "out"), atomic_directory(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("")
    assert names(tmp_path) == ["out"]


def test_one_writer_takes_the_output_from_a_parameter_or_its_attribute(tmp_path):
    class Options:
        out = tmp_path / "a"

    @one_writer("out")
    def by_name(what, out):
        return what, names(out.parent)

    @one_writer("options.out", inside=True)
    def by_attribute(options):
        return names(options.out)

    assert by_name(1, tmp_path / "x") == (1, [".x.bevqat.lock"])
    assert by_name(what=1, out=tmp_path / "x") == (1, [".x.bevqat.lock"])
    assert by_attribute(Options()) == [".bevqat.lock"]
    assert names(tmp_path) == []


def test_what_another_run_left_is_told_apart():
    check_same_run("resume.pth", {"seed": 1, "more": 2}, {"seed": 1}, "remove it")
    with refused("resume.pth: left by a run with another seed", "found None", "expected 1", "remove it"):
        check_same_run("resume.pth", {}, {"seed": 1}, "remove it")


def test_a_pools_worker_ends_with_its_killed_parent(tmp_path):
    code = """
        import multiprocessing, os, time
        from concurrent.futures import ProcessPoolExecutor
        from qat.core.processes import die_with_parent
        if __name__ == "__main__":
            pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), die_with_parent)
            print(pool.submit(os.getpid).result(), flush=True)
            time.sleep(60)
    """
    file = tmp_path / "pool.py"
    file.write_text(textwrap.dedent(code))
    process = subprocess.Popen(
        [sys.executable, file], cwd=ROOT, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    worker = int(process.stdout.readline())
    descriptor = os.pidfd_open(worker)
    process.kill()
    process.wait()
    process.stdout.close()
    try:
        assert select.select([descriptor], [], [], 20)[0]  # readable: it has ended
    finally:
        os.close(descriptor)


STRESS = """
    import os, random, sys
    from pathlib import Path
    from qat.core.errors import UserError
    from qat.core.files import atomic_directory, atomic_path

    root, file, folder = Path(sys.argv[1]), Path(sys.argv[1]) / "f", Path(sys.argv[1]) / "d"

    def write(n):
        rng, done = random.Random(n), 0
        for k in range(60):
            with atomic_path(file, durable=k % 10 == 0) as temporary:
                temporary.write_bytes(bytes([rng.randrange(256)]) * rng.randrange(1, 200_000))
        while done < 6:
            try:
                with atomic_directory(folder) as made:
                    for name in ("a", "b"):
                        (made / name).write_bytes(bytes([n]) * 5000)
                    done += 1
            except UserError as error:
                assert "is writing here" in str(error), error

    def read():
        for _ in range(1500):
            content = file.read_bytes()
            assert content and content == content[:1] * len(content)
            try:
                content = (folder / "a").read_bytes()
            except FileNotFoundError:
                continue  # the folder is being replaced
            assert content == content[:1] * 5000

    file.write_bytes(b"x")
    folder.mkdir()
    (folder / "a").write_bytes(b"x" * 5000)
    children = []
    for n in range(8):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                write(n) if n < 6 else read()
                os._exit(0)
            except BaseException as error:
                print(type(error).__name__, error, flush=True)
                os._exit(1)
    print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
    print(sorted(os.listdir(root)), len(os.listdir(folder)))
"""


def test_eight_processes_at_one_name_never_show_a_part_of_a_file_or_folder(tmp_path):
    said, problem = script(STRESS, tmp_path).communicate(timeout=120)
    assert said == f"{[0] * 8}\n['d', 'f'] 2\n", said + problem
