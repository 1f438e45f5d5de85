#!/bin/bash
# The sweep on a real SLURM: Debian's packages, one machine, two CPUs, loopback only. As root:
#   apt-get install --no-install-recommends slurm-wlm munge slurmdbd mariadb-server
#   tests/slurm/run.sh               (or one of the two: tests/slurm/run.sh slurmdbd)
# It starts SLURM (first without accounting, then with slurmdbd), executes scenario.py and stops what it started.
set -eu
cd "$(dirname "$0")/../.."
for needed in slurmctld slurmd slurmdbd munged mariadbd; do
	PATH=$PATH:/usr/sbin command -v $needed > /dev/null || { echo "no $needed: see the head of this script"; exit 77; }
done
export PATH=$PATH:/usr/sbin
PYTHON=${PYTHON:-$PWD/.venv/bin/python}
STATE=$(mktemp -d)
HOST=$(hostname -s)
export SLURM_CONF=$STATE/slurm.conf

stop() {  # by the numbers of what was started, the last first
	for file in ctld node dbd; do
		[ -f "$STATE/$file.pid" ] || continue
		pid=$(cat "$STATE/$file.pid")
		kill "$pid" 2> /dev/null || continue
		while kill -0 "$pid" 2> /dev/null; do sleep 0.2; done
	done
}
finish() {
	stop
	[ -n "${MUNGE:-}" ] && kill "$MUNGE"
	[ -n "${MARIA:-}" ] && kill "$MARIA" && wait "$MARIA"
	rm -rf "$STATE"
}
trap finish EXIT

if ! munge -n > /dev/null 2>&1; then  # a socket may be left of a process that was killed
	[ -f /etc/munge/munge.key ] || mungekey --create
	mkdir -p /run/munge
	chown munge: /run/munge /etc/munge/munge.key
	runuser -u munge -- munged --foreground --force & MUNGE=$!
	sleep 1
fi

configure() {  # $1: accounting storage
	cat > "$SLURM_CONF" <<-END
	ClusterName=book
	SlurmctldHost=$HOST(127.0.0.1)
	SlurmUser=root
	SlurmctldPort=16817
	StateSaveLocation=$STATE/$1
	SlurmctldPidFile=$STATE/ctld.pid
	SlurmdPidFile=$STATE/node.pid
	SlurmdSpoolDir=$STATE/spool
	SlurmctldLogFile=$STATE/ctld.log
	SlurmdLogFile=$STATE/node.log
	ProctrackType=proctrack/linuxproc
	TaskPlugin=task/none
	SelectType=select/cons_tres
	SelectTypeParameters=CR_Core
	ReturnToService=2
	MinJobAge=3600
	SchedulerParameters=batch_sched_delay=1,sched_interval=2
	AccountingStorageType=accounting_storage/$1
	AccountingStorageHost=127.0.0.1
	AccountingStoragePort=16820
	NodeName=$HOST NodeAddr=127.0.0.1 Port=16818 CPUs=2 RealMemory=4000
	PartitionName=book Nodes=$HOST Default=YES MaxTime=UNLIMITED
	END
	mkdir -p "$STATE/$1"
}

database() {
	mkdir "$STATE/maria"
	chown mysql: "$STATE" "$STATE/maria"
	mariadb-install-db --user=mysql --datadir="$STATE/maria" > "$STATE/maria.log" 2>&1
	mariadbd --no-defaults --user=mysql --datadir="$STATE/maria" --socket="$STATE/maria.socket" \
		--pid-file="$STATE/maria.pid" --port=16819 --bind-address=127.0.0.1 >> "$STATE/maria.log" 2>&1 & MARIA=$!
	until mariadb --socket="$STATE/maria.socket" -e "create database book; create user slurm@localhost identified by
		'slurm'; grant all on book.* to slurm@localhost" 2> /dev/null; do sleep 1; done
	cat > "$STATE/slurmdbd.conf" <<-END
	DbdHost=$HOST
	DbdAddr=127.0.0.1
	DbdPort=16820
	SlurmUser=root
	PidFile=$STATE/dbd.pid
	LogFile=$STATE/dbd.log
	StorageType=accounting_storage/mysql
	StorageHost=127.0.0.1
	StoragePort=16819
	StorageUser=slurm
	StoragePass=slurm
	StorageLoc=book
	END
	chmod 600 "$STATE/slurmdbd.conf"
	slurmdbd
	until sacctmgr --immediate add cluster book > /dev/null 2>&1; do sleep 1; done
}

exec > >(tee tests/slurm/output.txt)
for accounting in ${*:-none slurmdbd}; do
	configure $accounting
	[ $accounting = slurmdbd ] && database
	slurmctld
	slurmd
	until sinfo --noheader --format=%T | grep -q idle; do sleep 1; done
	echo "SLURM $(sinfo --version | cut -d ' ' -f 2), accounting: $accounting"
	"$PYTHON" tests/slurm/scenario.py
	stop
done
