# Agent farm: many coding agents on one git repo, and a main branch that is never red. `make` alone prints the help.

N      ?= 10
# how many agents (a mix says it by itself)
BASE   ?=
# the target branch: agents start from it, work lands on it (default: the branch that REPO has checked out)
AGENT  ?=
# a preset (claude, claude-print, codex, gemini, opencode, aider), a mix such as claude:6,codex:4, or any command (default: claude)
GATE   ?=
# the test command that must pass before anything lands, such as 'make test'
GATE_ON ?=
# where gates run, here, slurm or ssh:BOX: make farm GATE_ON=slurm GATE='make test' (default: here)
TASKS  ?=
# a file of tasks to add first: a Markdown checklist, JSON lines or plain lines
REPO   ?= .
# the git repo to work on; ../app works without copying anything there
ON     ?=
# where agents run, words of here, slurm, ssh:BOX: make farm ON='ssh:box1 here' (default: here)
A      ?= 1
# which agent: 3 means agent-003
GOAL   ?=
# what make plan is to reach
YES    ?=
# 1: add the plan's tasks at once
T      ?=
# which task: make show T=t-0007
DEST   ?=
# where install-into copies the toolkit to
SECONDS ?= 60
# how long chaos lasts
HOSTS  ?=
# on how many hosts chaos is, besides the hub
ONLY   ?=
# which groups of bench rows, as a pattern: make bench ONLY=verbs
FULL   ?=
# 1: bench at full size, for some ten minutes more
TOOLKIT := $(shell f='$(lastword $(MAKEFILE_LIST))'; [ -e "$$f" ] || f='$(strip $(MAKEFILE_LIST))'; CDPATH= cd "$$(dirname "$$f")" && pwd -P)
# where farm.py and scripts/ are (make itself splits a path at its spaces, so the shell finds it)
PYTHON ?= python3
# the interpreter that .venv is made from

VENV   := $(TOOLKIT)/.venv
PY      = '$(VENV)/bin/python'
FARM    = FARM_PYTHON=$(PY) '$(TOOLKIT)/scripts/farm' --repo $(call quote,REPO)
# a variable's text as one word for the shell, exactly as it was given: `$` in it is the agent's or the gate's, not make's
quote   = '$(subst ','\'',$(value $(1)))'
option  = $(if $(value $(2)),$(1) $(call quote,$(2)))

.DEFAULT_GOAL := help
.PHONY: help pictures setup test-setup demo farm add plan status watch show attach overview logs merge pause resume stop estop clean report doctor test test-agents lint bench chaos year install-into

##@ Use
help: ## print this help
	@awk 'BEGIN { FS = ":.*## " } /^##@ / { printf "\n%s\n", substr($$0, 5) } /^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@printf '\nVariables\n'; awk '/^[A-Z]+ +\?=/ { name = $$1; getline; sub(/^# /, ""); printf "  %-18s %s\n", name, $$0 }' $(firstword $(MAKEFILE_LIST))

setup: ## check the tools, make .venv with the run-time packages
	@bash '$(TOOLKIT)/scripts/make-venv.sh' '$(VENV)' '$(PYTHON)' '$(TOOLKIT)/farm.py'
demo: setup ## a throw-away repo, ten scripted agents, twelve tasks: see it work in half a minute
	@$(PY) '$(TOOLKIT)/tests/campaigns/demo.py' $(call option,--on,ON)
farm: setup ## start N agents on REPO: make farm N=10 TASKS=tasks.md AGENT=claude GATE='make test'
	@$(if $(value TASKS),$(FARM) add -f $(call quote,TASKS))
	@$(FARM) up $(if $(and $(findstring :,$(value AGENT)),$(filter file,$(origin N))),,-n $(call quote,N)) $(call option,--into,BASE) $(call option,--agent,AGENT) $(call option,--gate,GATE) $(call option,--gate-on,GATE_ON) $(call option,--on,ON)
add: setup ## add the tasks of a file: make add TASKS=tasks.md
	@$(FARM) add -f $(call quote,TASKS)
plan: setup ## one agent makes a list of tasks: make plan GOAL='...' AGENT=claude YES=1
	@$(FARM) plan $(call quote,GOAL) $(call option,--agent,AGENT) $(if $(value YES),--yes)
status: setup ## agents, tasks, merge queue, loop
	@$(FARM) status
watch: setup ## the same, again and again, with keys; q leaves
	@$(FARM) status --watch
show: setup ## all of one task: make show T=t-0007
	@$(FARM) show $(call quote,T)
attach: setup ## go into an agent's session: make attach A=3 (leave with Ctrl-b d)
	@$(FARM) attach $(call quote,A)
overview: setup ## look at all agents at once, tiled (leave with Ctrl-b d)
	@$(FARM) attach --all
logs: setup ## what an agent printed: make logs A=3
	@$(FARM) logs $(call quote,A)
merge: setup ## land what is ready, once
	@$(FARM) merge $(call option,--into,BASE) $(call option,--gate,GATE)
pause: setup ## hand out no new work
	@$(FARM) pause
resume: setup ## hand out work again
	@$(FARM) resume
stop: setup ## let agents finish, stop everything, keep all work
	@$(FARM) down
estop: setup ## stop everything this second, keep all work
	@$(FARM) estop
clean: setup ## remove the worktrees and branches that are safe to remove
	@$(FARM) clean
report: setup ## write the page of all that happened, and print its path
	@$(FARM) report
doctor: setup ## what is missing or damaged, and the command that mends it
	@$(FARM) doctor

##@ Work on the toolkit
test: test-setup ## the whole test suite
	@cd '$(TOOLKIT)' && $(PY) -m pytest -q -n 4 tests/test_isolation*.py tests
test-agents: test-setup ## ten sessions of the real Claude Code (from npm) through the farm, no network but npm
	@$(PY) '$(TOOLKIT)/tests/campaigns/agents.py'
lint: test-setup ## ruff, and shellcheck where it is installed
	@cd '$(TOOLKIT)' && '$(VENV)/bin/ruff' check farm.py tests && '$(VENV)/bin/ruff' format --quiet --line-length 100 --diff farm.py
	@cd '$(TOOLKIT)' && if command -v shellcheck >/dev/null; then shellcheck scripts/*.sh scripts/*/*.sh tests/campaigns/*.sh .ci/run; else echo 'shellcheck is not installed: scripts were not checked'; fi
bench: test-setup ## measure the speed figures beside their floors
	@$(PY) '$(TOOLKIT)/tests/campaigns/bench.py' $(if $(value FULL),--full) $(call option,--only,ONLY)
year: test-setup ## COUNT tasks (10,000) through a farm: nothing grows with what has landed
	@$(PY) '$(TOOLKIT)/tests/campaigns/year.py' $(call option,--tasks,COUNT)
chaos: test-setup ## kill everything at random for SECONDS, then check that nothing was lost; HOSTS=3: of other machines, too
	@cd '$(TOOLKIT)' && $(if $(HOSTS),CHAOS_SECONDS=$(SECONDS) CHAOS_HOSTS=$(HOSTS) $(PY) -m pytest -q -s tests/campaigns/test_chaos_hosts.py,$(PY) tests/campaigns/chaos.py --seconds $(SECONDS) -n $(N))
pictures: test-setup ## make the README's pictures anew (needs Chromium)
	@$(PY) '$(TOOLKIT)/tests/campaigns/pictures.py'
install-into: ## copy farm.py and scripts/ into another repo: make install-into DEST=../app
	@bash '$(TOOLKIT)/scripts/install-into.sh' $(call quote,DEST)

test-setup: setup
	@[ '$(VENV)/tests-ready' -nt '$(TOOLKIT)/tests/requirements.txt' ] || { $(PY) -m pip install --quiet --disable-pip-version-check -r '$(TOOLKIT)/tests/requirements.txt' && touch '$(VENV)/tests-ready'; }
