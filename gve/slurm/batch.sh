set -u
restart=${SLURM_RESTART_COUNT:-0}
job=$SLURM_JOB_ID marker=$state/done work=unfrozen
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID marker=$marker-$SLURM_ARRAY_TASK_ID
fi
logs=$state/logs/$job-$restart
say() { printf '%s %s\n' "$(date '+%F %T')" "$*"; }

# The argument is the folder of a submission: code, configuration and purpose as they were then. Without one (sbatch by
# hand) the installed code runs.
if [ -n "${1:-}" ]; then
  work=$(cat "$1/work") || exit 2
  export PYTHONPATH=$1/code${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1 # the current folder must not come first
fi
if [ "$(cat "$marker" 2>/dev/null)" = "$work" ]; then
  say "done already; remove $marker to do it again"
  exit 0
fi
if [ "$restart" -gt "$max_restarts" ]; then
  say "started again $restart times, $max_restarts are allowed: submit it again to go on"
  exit 85
fi
mkdir -p "$logs" || exit 1
say "attempt $restart of job $job on $SLURM_JOB_NODELIST, rendezvous $MASTER_ADDR:$MASTER_PORT; logs in $logs"

# A trap runs only while bash waits, and children do not inherit it. SIGTERM comes at a time limit, a preemption, a
# requeue and a cancellation, to the tasks too: they save, and their exit code is waited for.
trap 'interrupted=1' TERM
start &
step=$!
while :; do
  interrupted=0
  wait "$step"
  code=$?
  [ "$interrupted" -eq 1 ] || break
done

case $code in
  0)
    printf '%s\n' "$work" >"$marker.tmp" && mv "$marker.tmp" "$marker"
    say "done"
    exit 0
    ;;
  85 | 138 | 143) ;; # stopped and saved; or ended by SIGUSR1 or SIGTERM before it could, as in the imports
  *)
    say "failed with exit code $code: see $logs"
    exit "$code"
    ;;
esac

# The shell requeues and not rank 0: here all ranks have ended, so none is killed at its save, and the tasks may run
# where there is no scontrol. A job that is no longer running was cancelled, or SLURM itself requeues it: hands off, as a
# requeue would bring a cancelled job back. Only one that ran out of time is the script's to requeue then.
trap '' TERM # scontrol inherits this: SLURM may still be at signalling all that the shell has started
controller() { # the controller may be busy: up to a minute
  for pause in 1 4 15 40 0; do
    scontrol "$@" && return
    sleep "$pause"
  done
  return 1
}
about=$(controller -o show job "$job")
[[ $about =~ JobState=([A-Z_]+) ]] && now=${BASH_REMATCH[1]}
[[ $about =~ Reason=([^ ]+) ]] && reason=${BASH_REMATCH[1]}
if [ "${now:-}" != RUNNING ] && [ "${reason:-}" != TimeLimit ]; then
  say "stopped (exit code $code); the job is ${now:-gone}: SLURM requeues it, or it was cancelled"
elif [ "$restart" -ge "$max_restarts" ]; then
  say "stopped (exit code $code) and started again $restart times already: submit it again to go on"
elif controller requeue "$job"; then
  say "stopped (exit code $code), requeued"
else
  say "stopped (exit code $code), but the cluster refused to requeue: submit it again to go on"
fi
exit "$code"
