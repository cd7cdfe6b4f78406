"""Forged and hostile files: what contradicts itself is named, and nothing else happens."""

import copy
import json
import struct
import zlib
from fractions import Fraction

import pytest

from benchmark_scripts import script
from cgmq_fx.cli import main
from cgmq_fx.errors import BudgetError, FileFormatError
from cgmq_fx.manifest import MANIFEST
from cgmq_fx.packed_file import content_digest
from cgmq_fx.verify import verify

mutated = script("mutated_files")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return mutated.sound_file(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def forge(sound, tmp_path):
    """Write a forged file: another manifest, other codes, each with a sound digest."""

    def write(change=None, *, codes=None, compressed=None):
        data = sound.read_bytes()
        if codes is not None:
            header, body = mutated.header_of(data)
            start, stop = header[codes[0]]["data_offsets"]
            data = mutated.with_header(
                header, body[:start] + codes[1](body[start:stop]) + body[stop:]
            )
        manifest = mutated.manifest_of(data)
        if change is not None:
            change(manifest)
        data = mutated.with_manifest(data, manifest, compressed=compressed)
        path = tmp_path / "forged.safetensors"
        path.write_bytes(mutated.signed(data, tmp_path) if compressed is None else data)
        return path

    return write


def refused(path, text):
    with pytest.raises(FileFormatError, match=text):
        verify(path)


def entry(manifest, kind, name):
    return next(item for item in manifest[kind] if item["name"] == name)


def set_operation(name, **values):
    return lambda manifest: entry(manifest, "operations", name).update(values)


def set_attribute(name, **values):
    return lambda manifest: entry(manifest, "operations", name)["attributes"].update(values)


def set_weight(name, **values):
    return lambda manifest: entry(manifest, "weights", name).update(values)


def test_the_sound_file_is_sound(sound, forge):
    found = verify(sound)
    assert found.satisfied
    assert found.notes == ()
    assert str(verify(forge())) == str(found)


CONV, FULL = "frozen.0_weight_", "frozen.7_weight_"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (set_weight(FULL, bits=2), f"'{FULL}'.* levels"),
        (set_weight(FULL, bits=2, quant_min=-1, quant_max=1), f"'{FULL}' .* takes .* at 2 bits"),
        (set_weight(FULL, shape=[5, 24]), f"'{FULL}' of shape .* takes"),
        (set_weight(FULL, shape=[24, 10]), f"'{FULL}' has a scale of shape .10."),
        (set_weight(FULL, signed=False), f"'{FULL}' has codes from"),
        (set_weight(FULL, scale=["F32", 10**6, [10]]), "no place in a pool"),
        (set_weight(FULL, channel_axis=7), "channel axis 7 of 2"),
        (set_weight(FULL, site=0), f"'{FULL}' has the site '0_weight_', which is another's"),
        (lambda m: m["sites"][0].update(elements=5), "have 162 elements, their site 5"),
        (set_operation("0", sources=[{"site": 0}, {"site": 5}]), "reads 300 elements through .*24"),
        (set_weight(FULL, site=99), "has the site 99"),
        (lambda m: m["weights"].append(m["weights"][0]), "names a tensor twice"),
        (lambda m: m["weights"].pop(), "does not know the tensor"),
        (set_operation("0", macs=7), r"operation '0' \(conv2d\) says 7 MACs, its shapes come to"),
        (set_operation("7", macs=1), r"operation '7' \(linear\) says 1 MACs"),
        (set_operation("7", weights=5), "says 5 weights, its attributes come to 240"),
        (set_attribute("0", kernel_0=1), "kernel_size"),
        (set_attribute("4", groups=6), r"operation '4' \(conv2d\) says"),
        (set_attribute("4", groups=0), "'groups'"),
        (set_attribute("7", in_features=1), "says"),
        (set_attribute("7", in_features=True), "no number 'in_features'"),
        (set_operation("7", sources=[{"bits": 2}, {"site": 1}]), "2 bits without a quantizer"),
        (set_operation("7", sources=[{"site": 99}, {"site": 1}]), "the sites .99. of"),
        (set_operation("7", sources=[]), "0 bit-widths, not 2"),
        (lambda m: m.update(float_parameters=1), "float parameters and counts 1"),
        (lambda m: m.update(stored_sites=[]), "stored and not counted"),
        (lambda m: m["tables"][0]["content"]["row"].pop(), "digest"),
        (lambda m: m["tables"][0]["content"].update(include="../../x.toml"), "includes no other"),
        (lambda m: m["tables"][0]["content"].update(row=[]), "malformed cost table"),
        (lambda m: m["tables"].clear(), "without a table"),
        (lambda m: m["resources"][0].update(share="1/2"), "its budget does not come to"),
        (lambda m: m["resources"][0].update(bound="99999999999"), "does not come to"),
        (lambda m: m["resources"][0].update(bound="1/0"), "exact number"),
        (lambda m: m["resources"].pop(0), "not those of"),
        (lambda m: m.update(model="\x1b[2J"), "printable"),
        (lambda m: m["parameters"].append("../../etc/passwd"), "name of a tensor"),
        (lambda m: m.update(version=2), "version 2"),
        (lambda m: m.update(format="other"), "not of the format"),
        (lambda m: m.update(extra=1), "stands where"),
        (lambda m: m.update(operations=[[]] * 12_000), "at most 10,000 items"),
        (lambda m: m["live"][0].update(first=9, last=1), "lives from 9 to 1"),
    ],
)
def test_a_forged_manifest_is_named(forge, change, text):
    refused(forge(change), text)


def test_a_narrower_activation_is_named(forge):
    def change(manifest):
        manifest["quantizers"][-1]["bits"] = 2

    refused(forge(change), "levels, .* which is not 2 bits")


def test_codes_beyond_their_grid_are_named(forge):
    lowest = forge(codes=(f"{FULL}.codes", lambda data: b"\x80" * len(data)))
    refused(lowest, f"'{FULL}'.* has codes from")


def test_scales_that_are_no_numbers_are_named(forge):
    nan = struct.pack("<f", float("nan"))
    broken = forge(codes=("cgmq_fx_file.qparams.F32", lambda data: nan + data[4:]))
    refused(broken, "scale that is not finite")


def test_flipped_codes_do_not_fit_the_digest(sound, tmp_path):
    data = bytearray(sound.read_bytes())
    header, body = mutated.header_of(bytes(data))
    start, _ = header[f"{FULL}.codes"]["data_offsets"]
    data[len(data) - len(body) + start] ^= 1
    path = tmp_path / "flipped.safetensors"
    path.write_bytes(data)
    refused(path, "SHA-256")


def put(tmp_path, data):
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(data)
    return path


ONE = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


HEADERS = [
    ({"a": {**ONE, "shape": [2**40, 2**40]}}, "no sound shape|takes"),
    ({"a": {**ONE, "shape": [2**62] * 40}}, "no sound shape"),
    ({"a": {**ONE, "shape": [-4]}}, "no sound shape"),
    ({"a": {**ONE, "shape": [4.0]}}, "no sound shape"),
    ({"a": ONE, "b": ONE}, "that no tensor, or two, have"),
    ({"a": {**ONE, "shape": [2], "data_offsets": [2, 4]}}, "that no tensor"),
    ({"a": {**ONE, "shape": [2], "data_offsets": [0, 2]}}, "behind its last tensor"),
    ({"a": {**ONE, "dtype": "F4"}}, "otherwise than"),
    ({"a": {**ONE, "dtype": []}}, "otherwise than"),
    ({"../../a": ONE}, "no name of a tensor"),
    ({"/a": ONE}, "no name of a tensor"),
    ({"": ONE}, "no name of a tensor"),
    ({"a": ONE, "__metadata__": {"a": 1}}, "metadata"),
    ({"a": ONE}, "has no manifest"),
    ([], "no mapping"),
    (b'{"a":' + json.dumps(ONE).encode() + b',"a":1}', "stands there twice"),
    (b"[" * 200_000, "nested too deeply"),
    (b'{"a":' * 200_000, "nested too deeply"),
    (b'{"a":NaN}', "NaN is no number"),
    (b'{"a":' + b"9" * 9000 + b"}", "no sound JSON"),
    (b"\xff\xfe", "no sound JSON"),
]


@pytest.mark.parametrize(("header", "text"), HEADERS, ids=[text for _, text in HEADERS])
def test_hostile_headers_are_refused(header, text, tmp_path):
    refused(put(tmp_path, mutated.with_header(header, b"\0" * 4)), text)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "is empty"),
        (b"abc", "no header"),
        (struct.pack("<Q", 2**63) + b"{}", "announces a header"),
        (struct.pack("<Q", 100) + b"{}", "announces a header"),
    ],
)
def test_short_files_are_refused(data, text, tmp_path):
    refused(put(tmp_path, data), text)


def test_what_is_no_file_is_refused(tmp_path):
    refused(tmp_path, "cannot be read|not a plain file")
    refused(tmp_path / "missing.safetensors", "cannot be read")
    refused("nul\0byte", "cannot be read")


@pytest.mark.parametrize(
    ("compressed", "text"),
    [
        (zlib.compress(b"\0" * (1 << 28)), "more than 4,194,304 bytes"),
        (b"not zlib", "not compressed by zlib"),
        (zlib.compress(b"{}")[:-2], "ends too early"),
        (zlib.compress(b"{}") + b"more", "too late"),
        (zlib.compress(b"[" * 100_000), "nested too deeply"),
        (zlib.compress(b"[" + b"[]," * 1_000_000 + b"1]"), "1,000,001 lists and mappings"),
        (zlib.compress(b'{"format":"cgmq_fx.packed","format":1}'), "stands there twice"),
    ],
    ids=["bomb", "noise", "cut", "longer", "deep", "many", "duplicate"],
)
def test_hostile_manifests_are_refused(forge, compressed, text):
    refused(forge(compressed=compressed), text)


def test_tables_that_would_take_long_are_refused(forge):
    def change(manifest):
        manifest["tables"][0]["content"]["row"][0]["where"] = f"macs > 0{' and macs > 0' * 1000}"
        item = manifest["operations"][1]
        manifest["operations"] += [copy.deepcopy(item) for _ in range(2000)]

    refused(forge(change), "take too long to price")


# -- bounds of the caller --------------------------------------------------------------------------


def test_a_budget_of_the_call_goes_before_that_of_the_file(sound):
    own = verify(sound)
    assert set(own.budgets) == {"bops", "weight_memory", "peak_activation_memory"}
    found = verify(sound, {"bops": "1 BOP"})
    assert not found.satisfied
    assert found.budgets == {**own.budgets, "bops": Fraction(1)}
    assert found.totals == own.totals


def test_a_table_of_the_call_prices_too(sound):
    found = verify(sound, {"macs": "100%"}, cost_table="macs")
    assert found.totals["macs"] == sum(row.macs for row in found.rows)
    assert found.satisfied
    assert verify(sound, "1 MMAC", cost_table="macs").budgets["macs"] == 10**6


def test_a_budget_on_something_unknown_is_an_error_of_the_call(sound):
    with pytest.raises(BudgetError, match="unknown resource"):
        verify(sound, {"cycles_of_it": "1%"})


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], 0),
        (["--json"], 0),
        (["--budget", "bops=1 BOP"], 1),
        (["--budget", "macs=100%", "--cost-table", "macs"], 0),
        (["--budget", "100%", "--budget", "100%"], 2),
        (["--budget", "nonsense=1%"], 2),
        (["--cost-table", "no_such_table"], 2),
    ],
    ids=str,
)
def test_exit_codes(sound, arguments, code, capsys):
    assert main(["verify", str(sound), *arguments]) == code
    out, err = capsys.readouterr()
    if code == 2:
        assert err.startswith("cgmq-fx: ")
    elif "--json" in arguments:
        assert json.loads(out)["satisfied"]
    else:
        assert ("OVER BUDGET" in out) == (code == 1)


def test_a_forged_file_ends_the_command_with_2(forge, capsys):
    assert main(["verify", str(forge(set_operation("0", macs=7)))]) == 2
    assert "operation '0' (conv2d) says 7 MACs" in capsys.readouterr().err


def test_the_digest_leaves_the_manifest_out(sound):
    from cgmq_fx.container import open_container

    tensors = open_container(sound).tensors
    without = [tensor for name, tensor in tensors.items() if name != MANIFEST]
    assert content_digest(tensors.values()) == content_digest(without)
