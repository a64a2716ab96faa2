//! This machine, and whether a process that announced itself still lives on it.

use rustix::process::{Pid, test_kill_process};

/// The machine's name, as `uname -n` prints it.
pub fn name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Whether a process lives, where that can be known: on this machine.
pub fn is_running(host: &str, pid: u32) -> Option<bool> {
    if host != name() {
        return None;
    }
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw)?;
    // Another user's process answers "not permitted", and lives.
    Some(!matches!(test_kill_process(pid), Err(rustix::io::Errno::SRCH)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_alive_or_dead_on_its_own_machine_only() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        assert_eq!(is_running(&name(), std::process::id()), Some(true));
        assert_eq!(is_running(&name(), child.id()), Some(false));
        assert_eq!(is_running("another machine", child.id()), None);
        assert_eq!(is_running(&name(), 0), None);
    }
}
