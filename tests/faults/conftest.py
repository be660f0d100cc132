import pytest


@pytest.fixture(scope="module")
def table(request):
    """Prints the counts at the end."""
    counts = {}
    yield counts
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print("\n\n| input | mutants | worked | refused |\n| --- | --: | --: | --: |")
        for kind, count in counts.items():
            print(f"| {kind} | {count.total()} | {count['worked']} | {count['refused']} |")
