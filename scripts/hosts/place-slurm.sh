#!/usr/bin/env bash
# Usage: place-slurm.sh up JOB FILE 0 OPTIONS <LINES
#        place-slurm.sh end JOB FILE SECONDS '' <LINES
# place.sh by Slurm: the host s3 is the element 3 of an array called JOB, which runs FILE. What the
# queue lacks is submitted; that its node lives is not asked, the farm's leases decide that.
# Prints: HOST<TAB>what Slurm says of its job
# Exit: 0 ok, 2 usage
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/../merge/common.sh"

# HOST<TAB>words for each of our jobs that is not over
find_jobs() {
  squeue --noheader --array --user="$(id -un)" --name="$job" --format='s%K|%F_%K|%T|%r' |
    awk -F '|' '{ why = $4 == "None" ? "" : " (" $4 ")"; print $1 "\tslurm job " $2 ": " $3 why }'
}

tell_all() { # WORDS
  escape "$1"
  awk -F '\t' -v words="${escaped//\\/\\\\}" '{ print $1 "\t" words }' <<<"$lines"
}

submit_missing() {
  local count hosts said
  # an array for each number of agents
  awk -F '\t' 'NR == FNR { has[$1] = 1; next } ! ($1 in has) {
      list[$3] = list[$3] (list[$3] == "" ? "" : ",") substr($1, 2) }
    END { for (count in list) { print count, list[count] } }' <(printf '%s\n' "$jobs") - \
    <<<"$lines" |
    while read -r count hosts; do
      # shellcheck disable=SC2086  # options are words
      if said=$(sbatch --parsable --requeue --job-name="$job" --array="$hosts" \
        --output=/dev/null $options "$spoke" run s%a "$count" 2>&1 </dev/null); then
        said="slurm job ${said##*$'\n'}: submitted"
      else
        said="slurm: ${said##*$'\n'}"
      fi
      escape "$said"
      tr , '\n' <<<"$hosts" | sed "s|.*|s&	${escaped//[&|\\]/ }|"
    done
}

# Whether none is left after SECONDS at most.
is_over_in() { # SECONDS
  local turn
  for ((turn = 0; turn <= $1 * 2; turn++)); do
    jobs=$(find_jobs) || return 1
    if [ -z "$jobs" ]; then return; fi
    sleep 0.5
  done
  return 1
}

# A spoke that is told a second time lets its agents finish nothing. Prints what is left.
end_all() { # SECONDS
  local turn jobs
  scancel --user="$(id -un)" --name="$job" --state=PENDING
  if is_over_in "$1"; then return; fi
  for turn in 1 2 8; do
    scancel --user="$(id -un)" --name="$job" --batch --signal=TERM
    if is_over_in "$turn"; then return; fi
  done
  scancel --user="$(id -un)" --name="$job"
  if is_over_in 10; then return; fi
  cut -f 2 <<<"$jobs" | tr '\n' ' '
  return 1
}

main() {
  local verb=${1-} job=${2-} spoke=${3-} seconds=${4-} options=${5-} lines jobs said
  if [ "$verb" = -h ]; then usage; exit 0; fi
  [ $# -eq 5 ] || die 2 "a verb, a job, a file, seconds and options" "place-slurm.sh -h"
  set -f
  lines=$(cat)
  if [ "$verb" = end ]; then
    if said=$(end_all "$seconds" 2>&1); then said=ended; else said="slurm: ${said##*$'\n'}"; fi
    tell_all "$said"
  elif jobs=$(find_jobs 2>&1); then
    submit_missing
    awk -F '\t' 'NR == FNR { asked[$1] = 1; next } $1 in asked' <(printf '%s\n' "$lines") - \
      <<<"$jobs"
  else
    tell_all "slurm: ${jobs##*$'\n'}"
  fi
}

main "$@"
